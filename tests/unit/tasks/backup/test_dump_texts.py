"""The text of a dump is cut at its tables and its rows are counted, wherever the pieces end in which it comes."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from registry.errors import ArtifactError
from tasks.backup.mariadb_access import quiet
from tasks.backup.mariadb_dump import DumpText as MariadbText
from tasks.backup.mariadb_dump import begun
from tasks.backup.postgresql_access import quiet as postgresql_quiet
from tasks.backup.postgresql_dump import DumpText as PostgresqlText

MARIADB = rb"""/*M!999999\- enable the sandbox mode */
-- MariaDB dump 10.19

--
-- Sequence structure for `numbers`
--

CREATE SEQUENCE `numbers`;

--
-- Table structure for table `a``b`
--

CREATE TABLE `a``b` (
  `x` int
);
INSERT INTO `a``b` VALUES
(1,'a);\n(b'),
(2,'INSERT INTO `c` VALUES'),
(3,')');
/*!50003 CREATE TRIGGER t BEFORE INSERT ON x FOR EACH ROW BEGIN
(
--
-- Table structure for table `a``b`
--
(select 1); END */;;

--
-- Table structure for table `c`
--

CREATE TABLE `c` (`x` int);
INSERT INTO `c` (`x`, `y(`) VALUES
(1,2);
INSERT INTO `c` (`x`, `y(`) VALUES
(1,2),
(NULL,0x00);

--
-- Temporary table structure for view `v`
--

CREATE VIEW `v` AS SELECT 1;

--
-- Dumping routines for database 'd'
--
CREATE PROCEDURE p() INSERT INTO `c` SELECT 1;

-- Dump completed
"""
MYSQL = rb"""-- MySQL dump 10.13

--
-- Table structure for table `c`
--

INSERT INTO `c` VALUES (1,'a);
x'),(2,'),(\'),('),(3,'it''s;');
INSERT INTO `c` VALUES (4,'');
INSERT INTO `d` VALUES (4,'');

-- Dump completed on 2026-11-21  2:00:00
"""
POSTGRESQL = rb"""--
-- PostgreSQL database dump
--

CREATE FUNCTION f() AS $$
COPY public.a (x) FROM stdin;
$$;

--
-- Data for Name: a; Type: TABLE DATA; Schema: public; Owner: keeper
--

COPY public.a (x, "y z") FROM stdin;
1	\\.
2	COPY public.b (x) FROM stdin;
\.


--
-- Data for Name: b 1; Type: TABLE DATA; Schema: public; Owner: keeper
--

COPY public."b 1"  FROM stdin;
\.


--
-- PostgreSQL database dump complete
--

\unrestrict x

"""


def pieces(text: bytes, chance: random.Random, longest: int) -> Iterator[bytes]:
    place = 0
    while place < len(text):
        size = chance.randint(1, longest)
        yield text[place : place + size]
        place += size


@pytest.mark.parametrize("longest", [1, 3, 40, 5000])
@pytest.mark.parametrize("seed", range(5))
def test_a_mariadb_dump_is_cut_and_counted_alike_however_it_comes(longest: int, seed: int) -> None:
    text = MariadbText(pieces(MARIADB, random.Random(seed), longest), ["numbers", "a`b", "c"])
    sections = [(one.table, b"".join(one.pieces)) for one in text.sections()]
    assert [table for table, _ in sections] == [None, "numbers", "a`b", "c", None, None]
    assert b"".join(body for _, body in sections) == MARIADB.split(b"\n", 1)[1]
    assert b"CREATE TABLE `c`" in sections[3][1] and b"CREATE VIEW" not in sections[3][1]
    assert dict(text.rows) == {"a`b": 3, "c": 3}
    text.finish()


@pytest.mark.parametrize("longest", [1, 7, 5000])
def test_the_rows_of_mysqls_one_line_statements_are_counted(longest: int) -> None:
    text = MariadbText(pieces(MYSQL, random.Random(1), longest), ["c", "d"])
    assert b"".join(b"".join(one.pieces) for one in text.sections()) == MYSQL
    assert dict(text.rows) == {"c": 4, "d": 1}
    text.finish()


@pytest.mark.parametrize("longest", [1, 3, 40, 5000])
@pytest.mark.parametrize("seed", range(5))
def test_a_postgresql_dump_is_cut_and_counted_alike_however_it_comes(longest: int, seed: int) -> None:
    text = PostgresqlText(pieces(POSTGRESQL, random.Random(seed), longest), ['"public"."a"', '"public"."b 1"'])
    sections = [(one.table, b"".join(one.pieces)) for one in text.sections()]
    assert [table for table, _ in sections] == [None, '"public"."a"', None, '"public"."b 1"', None]
    assert b"".join(body for _, body in sections) == POSTGRESQL
    assert dict(text.rows) == {'"public"."a"': 2, '"public"."b 1"': 0}
    text.finish()


@pytest.mark.parametrize("whole", [MARIADB, MYSQL, POSTGRESQL], ids=["mariadb", "mysql", "postgresql"])
def test_a_dump_without_its_last_line_is_no_dump(whole: bytes) -> None:
    kind = PostgresqlText if whole is POSTGRESQL else MariadbText
    cut = whole[: whole.rindex(b";\n") + 2]
    text = kind(iter([cut]), ["c", '"public"."a"'])
    for section in text.sections():
        for _ in section.pieces:
            pass
    with pytest.raises(ArtifactError, match="cut short"):
        text.finish()


def test_the_lock_is_let_go_only_when_a_table_is_there_or_the_dump_is_over() -> None:
    told: list[int] = []
    text = begun(
        iter([b"-- head\n", b"more\n--\n-- Table str", b"ucture for table `a`\n", b"rest"]), lambda: told.append(1)
    )
    assert next(text) == b"-- head\nmore\n--\n-- Table structure for table `a`\n"
    assert told == [1]
    assert list(text) == [b"rest"] and told == [1]
    assert list(begun(iter([b"-- head\n"]), lambda: told.append(2))) == [b"-- head\n"] and told == [1, 2]


@pytest.mark.parametrize(
    "said",
    [
        "--------------\nINSERT INTO t VALUES (1,'s3cret')\n--------------\n\nERROR 1062 (23000) at line 1: Duplicate entry 's3cret' for key 'PRIMARY'",
        "INSERT INTO t VALUES (1,'s3cret')\n--------------\n\nERROR 1064 (42000) at line 2: syntax to use near ''s3cret) it's' at line 1",
        "('s3cret'),\n--------------\nERROR 1366 (22007) at line 3: Incorrect integer value: 's3cret' for column `a`",
    ],
)
def test_what_mariadb_says_of_a_failed_statement_is_told_without_its_rows(said: str) -> None:
    assert "s3cret" not in quiet(said)
    assert quiet(said).startswith("ERROR 1")


def test_what_postgresql_says_of_a_failed_statement_is_told_without_its_rows() -> None:
    said = (
        'psql:<stdin>:12: ERROR:  invalid input syntax for type integer: "s3cret"\n'
        'CONTEXT:  COPY t, line 1, column a: "s3cret"\nDETAIL:  Key (a)=(s3cret) already exists.\n'
    )
    assert "s3cret" not in postgresql_quiet(said)
    assert "invalid input syntax" in postgresql_quiet(said)
