"""Triton beside our server, with the same models and the same requests: what differs is listed, with its reason."""

from __future__ import annotations

import socket
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.serving.parity.cases import every_case
from tests.integration.serving.parity.exchange import Client, differences
from tests.integration.serving.parity.listed import ENDS_TRITON, LISTED
from tests.integration.serving.parity.models import MODELS
from tests.integration.serving.parity.servers import Running, ours, triton, written

SEED = 20261121
CASES = every_case(SEED)
pytestmark = pytest.mark.timeout(700)  # the first run installs


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(MODELS, tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def server(files: Path) -> Iterator[Running]:
    with ours(MODELS, files) as running:
        yield running


@pytest.fixture(scope="module")
def other(files: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with triton(MODELS, files, tmp_path_factory.mktemp("triton")) as running:
        yield running


def test_both_servers_answer_alike_but_for_what_is_listed(server: Running, other: Running) -> None:
    seen: dict[str, list[set[tuple[str, str, str]]]] = defaultdict(list)
    clients = Client(other.port), Client(server.port)
    for case in CASES:
        if case.kind not in ENDS_TRITON:
            theirs, mine = (client.send(case) for client in clients)
            assert other.process.poll() is None, f"Triton ended after a request of the kind '{case.kind}'"
            assert mine.status, f"no answer to a request of the kind '{case.kind}'"
            seen[case.kind].append(differences(case, theirs, mine))
    for client in clients:
        client.close()
    found = {(kind, *one) for kind, answers in seen.items() for answer in answers for one in answer}
    new = [one for one in sorted(found) if not any(listed.holds(*one) for listed in LISTED)]
    gone = [one for listed in LISTED for one in listed.each() if not any(one.holds(*what) for what in found)]
    assert not new, "not listed (kind, aspect, Triton's, ours):\n" + "\n".join(map(repr, new))
    assert not gone, "listed, but no longer so:\n" + "\n".join(map(repr, gone))
    # Otherwise a difference could come to some requests of a kind, and nobody would see.
    torn = [kind for kind, answers in seen.items() if any(statuses(one) != statuses(answers[0]) for one in answers)]
    assert torn == []


def statuses(found: set[tuple[str, str, str]]) -> set[tuple[str, str, str]]:
    return {one for one in found if one[0] == "status"}


def test_ours_answers_requests_that_are_sent_in_one_go_all_and_in_their_order(server: Running) -> None:
    """Triton 2.51 answers the first, and the second when further bytes come: to wait for what does not come is no test."""
    names = ("same-int8", "none", "pair", "same-bytes")
    lines = [f"GET /v2/models/{name} HTTP/1.1\r\nHost: x\r\n" for name in names]
    sent = "\r\n".join([*lines[:-1], lines[-1] + "Connection: close\r\n\r\n"]).encode()
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(sent)
        with connection.makefile("rb") as stream:
            answers = stream.read()
    marks = [b'"name":"same-int8"', b'"error":', b'"name":"pair"', b'"name":"same-bytes"']
    found = [answers.find(mark) for mark in marks]
    assert answers.count(b"HTTP/1.1 ") == len(names) and -1 not in found and found == sorted(found), answers


@pytest.mark.parametrize("kind", ENDS_TRITON)
def test_ours_answers_what_ends_triton(kind: str, server: Running, files: Path, tmp_path: Path) -> None:
    cases = [case for case in CASES if case.kind == kind]
    assert len(cases) == 1
    [model] = [model for model in MODELS if model.name == cases[0].path.split("/")[3]]
    with triton([model], files, tmp_path) as other:
        client = Client(other.port)
        assert client.send(cases[0]).status == 0
        assert other.process.wait(30) < 0
        client.close()
    client = Client(server.port)
    answer = client.send(cases[0])
    client.close()
    assert 200 <= answer.status < 500, answer.body


def test_there_are_a_few_hundred_requests_and_they_are_the_same_each_time() -> None:
    assert len(CASES) > 500 and every_case(SEED) == CASES
    assert max(len(case.body) for case in CASES) < 100_000
    assert {case.kind for case in CASES} >= set(ENDS_TRITON)
