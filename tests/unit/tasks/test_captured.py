"""Fetching captured requests: the folder for them, and what is kept of what the servers send."""

from __future__ import annotations

import io
import signal
import stat
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from registry.errors import StorageError
from tasks import captured, servers
from tests.unit.tasks.answered import answered_by

PROGRAM = """
import sys
from pathlib import Path
from tasks import captured
with captured.folder(Path(sys.argv[1])) as folder:
    (folder / "1-.v2").write_bytes(b"a client's")
    print(folder, flush=True)
    sys.stdin.read()
"""


def test_the_folder_is_for_this_user_only_and_gone_afterwards(tmp_path: Path) -> None:
    with captured.folder(tmp_path / "cache" / "replays") as folder:
        assert folder.is_relative_to(tmp_path / "cache" / "replays") and not list(folder.iterdir())
        for place in (tmp_path / "cache" / "replays", folder.parent):
            assert stat.S_IMODE(place.stat().st_mode) == 0o700
        (folder / "1-.v2").write_bytes(b"1")
    assert not folder.parent.exists()


def test_what_a_killed_process_left_goes_and_what_another_uses_stays(tmp_path: Path) -> None:
    root = Path(captured.__file__).parents[1]
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=root,
    )
    try:
        assert process.stdout is not None
        left = Path(process.stdout.readline().strip())
        with captured.folder(tmp_path):
            assert (left / "1-.v2").exists(), "that process lives"
        process.send_signal(signal.SIGKILL)
        process.wait(30)
        assert (left / "1-.v2").exists()
        with captured.folder(tmp_path) as folder, captured.folder(tmp_path):
            assert not left.parent.exists()
            assert folder.exists(), "ours, of another replay"
    finally:
        process.kill()
        process.communicate()


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="no folder for captured requests can be made"):
        captured.folder(tmp_path / "file" / "replays").__enter__()


def packed(*times: int, damaged: bool = False) -> bytes:
    into = io.BytesIO()
    with zipfile.ZipFile(into, "w", zipfile.ZIP_STORED) as archive:
        for at in times:
            archive.writestr(f"{at:019d}-.v2", b"body %d" % at)
    content = into.getvalue()
    return content.replace(b"body %d" % times[-1], b"BODY %d" % times[-1]) if damaged else content


@pytest.fixture
def gather(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., captured.Gathered]:
    """Gather from servers that send these; the requests they got are in `asked`."""

    def run(newest: int, **sent: bytes) -> captured.Gathered:
        def answer(request: httpx.Request) -> httpx.Response:
            asked.append(request)
            return httpx.Response(200, stream=httpx.ByteStream(sent[request.url.host]))

        answered_by(monkeypatch, captured, answer)
        monkeypatch.setattr(servers, "access", lambda _: servers.NOBODY)
        monkeypatch.setattr(servers, "alive", lambda *_: {name: f"http://{name}" for name in sent})
        folder = tmp_path / "work" / "captured"
        folder.mkdir(parents=True)
        database: Any = None
        return captured.gather(database, "production", "m", folder, newest=newest)

    asked: list[httpx.Request] = []
    run.asked = asked  # type: ignore[attr-defined]
    run.folder = tmp_path / "work" / "captured"  # type: ignore[attr-defined]
    return run


def test_a_damaged_archive_is_a_problem_and_its_server_has_contributed_nothing(gather: Any) -> None:
    found = gather(10, one=packed(1, 2), three=b"no zip", two=packed(3, 4, damaged=True))
    assert found.requests == 2 and found.servers == ("one",)
    assert [problem.partition(":")[0] for problem in found.problems] == ["three", "two"]
    assert all("what it sends cannot be read: BadZipFile" in problem for problem in found.problems)
    assert sorted(path.read_bytes() for path in gather.folder.iterdir()) == [b"body 1", b"body 2"]


def test_servers_are_asked_to_send_them_as_they_are(gather: Any) -> None:
    gather(10, one=packed(1))
    assert [request.headers["accept-encoding"] for request in gather.asked] == ["identity"]


def test_no_more_than_the_newest_lie_there_at_any_time(gather: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    most, fetch = [], captured._fetch

    def fetched(*args: Any) -> str | None:
        most.append(len(list(gather.folder.iterdir())))
        return fetch(*args)

    monkeypatch.setattr(captured, "_fetch", fetched)
    found = gather(2, one=packed(1, 5), two=packed(2, 6), zeta=packed(3, 4))
    assert most == [0, 2, 2]
    assert found.requests == 2 and found.problems == ()
    assert sorted(path.read_bytes() for path in gather.folder.iterdir()) == [b"body 5", b"body 6"]
