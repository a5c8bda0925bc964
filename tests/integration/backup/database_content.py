"""What makes databases hard to dump and to bring back."""

from __future__ import annotations

BLOB_BYTES = 3 << 20

HARD_MARIADB = (
    # Foreign keys in a cycle, so that no order of the tables is right.
    "CREATE TABLE authors (id INT AUTO_INCREMENT PRIMARY KEY, name VARCHAR(80) NOT NULL, best INT NULL) ENGINE=InnoDB",
    "CREATE TABLE books (id INT AUTO_INCREMENT PRIMARY KEY, author INT NOT NULL, title VARCHAR(200), price DECIMAL(10,3), "
    "loud VARCHAR(200) AS (upper(title)) VIRTUAL, size INT AS (char_length(title)) STORED, "
    "FOREIGN KEY (author) REFERENCES authors (id) ON DELETE CASCADE, CHECK (price >= 0)) ENGINE=InnoDB",
    "ALTER TABLE authors ADD FOREIGN KEY (best) REFERENCES books (id)",
    "INSERT INTO authors (name) VALUES ('Ünïcode 🐘'), ('O''Hara \\\\ \\n(''),('), ('-- Dump completed')",
    "INSERT INTO books (author, title, price) VALUES (1, 'a);\\n(b', 1.125), (2, '\\r\\n\\0\\Z%%', 2), (3, '', NULL)",
    "UPDATE authors SET best = 2 WHERE id = 1",
    # Names that need quotes. (Names of MariaDB take no letters beyond the first plane: the server refuses them.)
    'CREATE TABLE `tä``ble 日本 (1` (`wért "x"` INT, `select` VARCHAR(9)) ENGINE=InnoDB',
    "INSERT INTO `tä``ble 日本 (1` VALUES (1, NULL), (1, 'x'), (1, 'x')",
    "CREATE TABLE empty_one (id BIGINT UNSIGNED AUTO_INCREMENT PRIMARY KEY) ENGINE=InnoDB AUTO_INCREMENT=77",
    "CREATE TABLE at_limit (id TINYINT AUTO_INCREMENT PRIMARY KEY) ENGINE=InnoDB",
    "INSERT INTO at_limit VALUES (127)",
    "CREATE TABLE dates (d DATE, t DATETIME(6), s TIMESTAMP(3) NULL, y YEAR) ENGINE=InnoDB",
    "INSERT INTO dates VALUES ('0000-00-00', '2026-00-00 00:00:00', '2026-03-29 02:30:00.123', 1901)",
    "CREATE TABLE zero (id INT AUTO_INCREMENT PRIMARY KEY, b BIT(9), f DOUBLE, j LONGTEXT CHECK (json_valid(j)), e ENUM('ä','b'), "
    "g GEOMETRY, u VARBINARY(20)) ENGINE=InnoDB",
    "INSERT INTO zero VALUES (0, b'101', 1e-300, '{\"a\": [1, null]}', 'ä', POINT(1, 2), x'00FF0A5C27')",
    "CREATE TABLE blobs (id INT PRIMARY KEY, body LONGBLOB) ENGINE=InnoDB",
    f"INSERT INTO blobs VALUES (1, REPEAT(x'00FF275C0A', {BLOB_BYTES // 5})), (2, ''), (3, NULL)",
    "CREATE TABLE log_lines (line TEXT) ENGINE=Aria",
    "INSERT INTO log_lines VALUES ('one'), ('two')",
    "CREATE TABLE alembic_version (version_num VARCHAR(32) PRIMARY KEY) ENGINE=InnoDB",
    "INSERT INTO alembic_version VALUES ('5f1c')",
    "CREATE SEQUENCE numbers START WITH 100",
    "CREATE TABLE parted (id INT PRIMARY KEY) ENGINE=InnoDB PARTITION BY RANGE (id) (PARTITION a VALUES LESS THAN (5), "
    "PARTITION b VALUES LESS THAN MAXVALUE)",
    "INSERT INTO parted VALUES (1), (9)",
    "CREATE VIEW a_view AS SELECT a.name, b.loud FROM authors a JOIN books b ON b.author = a.id",
    "CREATE VIEW z_view AS SELECT name FROM a_view",
    "CREATE TRIGGER before_book BEFORE INSERT ON books FOR EACH ROW BEGIN /* a comment\n(with a line */ SET NEW.title = trim(NEW.title); END",
    "CREATE PROCEDURE count_books(OUT total INT)\nBEGIN\r\n  -- a comment that must stay 🐘\n--\n-- Table structure for table `books`\n--\n"
    "  SELECT count(*) INTO total FROM books;\nEND",
    "CREATE FUNCTION twice(n INT) RETURNS INT DETERMINISTIC RETURN n * 2",
    "CREATE EVENT tidy ON SCHEDULE EVERY 1 DAY DO DELETE FROM log_lines WHERE line = 'old'",
)
HARD_ROWS = {
    "authors": 3,
    "books": 3,
    "tä`ble 日本 (1": 3,
    "empty_one": 0,
    "at_limit": 1,
    "dates": 1,
    "zero": 1,
    "blobs": 3,
    "log_lines": 2,
    "alembic_version": 1,
    "parted": 2,
}

HARD_POSTGRESQL = (
    'CREATE SCHEMA "ärger x"',
    "CREATE TYPE mood AS ENUM ('gut 🐘', 'it''s')",
    "CREATE TABLE authors (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, name text NOT NULL, best int)",
    "CREATE TABLE books (id serial PRIMARY KEY, author int NOT NULL REFERENCES authors ON DELETE CASCADE, title text, "
    "size int GENERATED ALWAYS AS (length(title)) STORED, price numeric(10,3) CHECK (price >= 0), m mood DEFAULT 'gut 🐘')",
    "ALTER TABLE authors ADD FOREIGN KEY (best) REFERENCES books (id) DEFERRABLE",
    "INSERT INTO authors (name) VALUES (E'Ünïcode 🐘'), (E'\\\\.\\n\\t\\\\N'), ('COPY public.books (id) FROM stdin;')",
    "INSERT INTO books (author, title, price) VALUES (1, E'a\\nb', 1.125), (2, '', 2), (3, NULL, NULL)",
    "UPDATE authors SET best = 2 WHERE id = 1",
    'CREATE TABLE "ärger x"."tä""ble.🐘 (1" ("wért ""x" int, "select" text)',
    'INSERT INTO "ärger x"."tä""ble.🐘 (1" VALUES (1, NULL), (1, \'x\'), (1, \'x\')',
    "CREATE TABLE empty_one (id bigint PRIMARY KEY)",
    "CREATE TABLE no_columns ()",
    "INSERT INTO no_columns DEFAULT VALUES",
    "CREATE TABLE odd (a int[], j jsonb, b bytea, f float8, i interval, t timestamptz, d date, r int4range)",
    "INSERT INTO odd VALUES ('{1,NULL}', '{\"a\": [1]}', '\\x00ff0a', 'NaN', '1 mon', '2026-03-29 02:30+02', 'infinity', '[1,5)')",
    f"CREATE TABLE blobs AS SELECT 1 AS id, decode(repeat('00ff275c0a', {BLOB_BYTES // 5}), 'hex') AS body",
    "CREATE TABLE parted (id int, k text) PARTITION BY RANGE (id)",
    "CREATE TABLE parted_a PARTITION OF parted FOR VALUES FROM (0) TO (5)",
    "CREATE TABLE parted_rest PARTITION OF parted DEFAULT",
    "INSERT INTO parted VALUES (1, 'a'), (9, 'b')",
    "CREATE TABLE alembic_version (version_num varchar(32) PRIMARY KEY)",
    "INSERT INTO alembic_version VALUES ('5f1c')",
    "CREATE SEQUENCE numbers START 100",
    "SELECT nextval('numbers')",
    "CREATE VIEW a_view AS SELECT a.name, b.title FROM authors a JOIN books b ON b.author = a.id",
    "CREATE MATERIALIZED VIEW kept AS SELECT count(*) AS n FROM a_view",
    "CREATE FUNCTION trimmed() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN\n-- a comment\nNEW.title = trim(NEW.title); RETURN NEW; END $$",
    "CREATE TRIGGER before_book BEFORE INSERT ON books FOR EACH ROW EXECUTE FUNCTION trimmed()",
    "CREATE INDEX lower_title ON books (lower(title))",
    "SELECT lo_from_bytea(0, '\\x0102')",
)
HARD_POSTGRESQL_ROWS = {
    '"public"."authors"': 3,
    '"public"."books"': 3,
    '"ärger x"."tä""ble.🐘 (1"': 3,
    '"public"."empty_one"': 0,
    '"public"."no_columns"': 1,
    '"public"."odd"': 1,
    '"public"."blobs"': 1,
    '"public"."parted_a"': 1,
    '"public"."parted_rest"': 1,
    '"public"."alembic_version"': 1,
    '"public"."kept"': 1,
}
