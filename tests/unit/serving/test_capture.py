"""Requests kept for replays: which ones, how many, for how long, and what happens where the disk does not want them."""

from __future__ import annotations

import asyncio
import io
import stat
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import orjson
import pytest
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st

from registry.errors import NotFoundError, UnavailableError, UsageError
from serving.traffic import capture as capturing
from serving.traffic.capture import Capture, name_of, parse_name
from serving.traffic.routing import Route
from serving.views.captured_page import router
from serving.views.pages import create_pages
from tests.unit.serving.helpers import close, load, no_nudge, request, serve

NOW = 1_763_726_400.0
Make = Callable[..., Capture]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """A capture in the test's folder that keeps everything unless told otherwise; its clock stands still."""
    made: list[Capture] = []

    def one(
        *, share: float = 1.0, requests: int = 1000, max_mb: int = 64, days: float = 7.0, now: float = NOW
    ) -> Capture:
        limits = SimpleNamespace(share=share, requests=requests, max_mb=max_mb, days=days)
        made.append(Capture(tmp_path / "captured", limits, wall_ns=lambda: int(now * 1e9)))
        made[-1].start()
        return made[-1]

    yield one
    for capture in made:
        capture.end(seconds=10)


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def bodies(capture: Capture, model: str = "m", newest: int = 1000) -> list[bytes]:
    into = io.BytesIO()
    count = capture.pack(model, newest, into)
    with zipfile.ZipFile(into) as archive:
        names = archive.namelist()
        assert len(names) == count and names == sorted(names)
        return [archive.read(name) for name in names]


def written(capture: Capture, count: int) -> None:
    until(lambda: capture.counts["kept"] + capture.counts["failed"] == count)


@given(at=st.integers(0, 10**19 - 1), header=st.none() | st.integers(0, 10**12))
def test_a_name_tells_when_it_came_and_how_to_decode_it(at: int, header: int | None) -> None:
    assert parse_name(name_of(at, header)) == (at, header)


@pytest.mark.parametrize("name", ["", ".v2", "1.v2", "x-.v2", "1-x.v2", "1-2.v2.new", "1-2", "-1.v2", "\u0661-.v2"])
def test_other_names_are_none_of_ours(name: str) -> None:
    assert parse_name(name) is None


def test_the_newest_are_kept_in_the_order_in_which_they_came_and_nobody_else_may_read_them(
    make: Make, tmp_path: Path
) -> None:
    capture = make(requests=3)
    for number in range(5):
        assert capture.offer("m", b"%d" % number, None)
    written(capture, 5)
    assert bodies(capture) == [b"2", b"3", b"4"]
    assert bodies(capture, newest=2) == [b"3", b"4"]
    assert capture.held()["m"].requests == 3 and capture.held()["m"].bytes == 3
    files = list((tmp_path / "captured" / "m").iterdir())
    assert len(files) == 3
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o600}
    assert stat.S_IMODE((tmp_path / "captured" / "m").stat().st_mode) == 0o700


def test_no_more_bytes_than_allowed_are_kept_and_one_that_is_larger_by_itself_is_not_taken(make: Make) -> None:
    capture = make(max_mb=1)
    for letter in (b"a", b"b", b"c"):
        assert capture.offer("m", letter * (400 << 10), None)
    written(capture, 3)
    assert [body[:1] for body in bodies(capture)] == [b"b", b"c"]
    assert not capture.offer("m", b"x" * ((1 << 20) + 1), None)
    assert capture.counts["dropped"] == 1


def test_a_model_does_not_take_the_place_of_another(make: Make) -> None:
    capture = make(requests=2)
    for number in range(6):
        capture.offer("one" if number else "two", b"%d" % number, 7)
    written(capture, 6)
    assert bodies(capture, "one") == [b"4", b"5"] and bodies(capture, "two") == [b"0"]


def test_the_next_process_finds_them_and_forgets_what_is_too_old_or_half_written(make: Make, tmp_path: Path) -> None:
    first = make()
    first.offer("m", b"old", None)
    written(first, 1)
    first.end(seconds=10)
    later = make(now=NOW + 5 * 86400)
    later.offer("m", b"young", 3)
    written(later, 1)
    later.end(seconds=10)
    place = tmp_path / "captured" / "m"
    (place / (name_of(9, None) + ".new")).write_bytes(b"cut o")
    (place / "notes.txt").write_text("somebody's own")
    last = make(now=NOW + 8 * 86400)
    until(lambda: last.held() and last.held()["m"].requests == 1)
    assert bodies(last) == [b"young"]
    assert sorted(path.suffix for path in place.iterdir()) == [".txt", ".v2"]


def test_a_server_that_keeps_none_any_more_still_forgets_the_old(make: Make, tmp_path: Path) -> None:
    first = make()
    first.offer("m", b"old", None)
    written(first, 1)
    first.end(seconds=10)
    off = make(share=0.0, now=NOW + 30 * 86400)
    assert not off.wants()
    until(lambda: not list((tmp_path / "captured" / "m").iterdir()))


def test_a_disk_that_does_not_take_them_is_counted_and_does_not_end_it(
    make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    capture = make()
    until(lambda: not capture.held())
    (tmp_path / "captured").mkdir(exist_ok=True)
    (tmp_path / "captured" / "m").write_text("a file where the folder should be")
    capture.offer("m", b"1", None)
    capture.offer("m", b"2", None)
    capture.offer("other", b"3", None)
    written(capture, 3)
    assert (capture.counts["failed"], capture.counts["kept"]) == (2, 1)
    assert sum("could not be kept" in record.message for record in caplog.records) == 1, "said once, not for each"


def test_a_disk_that_is_behind_holds_up_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capturing, "QUEUE_BYTES", 10)
    capture = Capture(tmp_path, SimpleNamespace(share=1.0, requests=9, max_mb=1, days=1.0))  # its thread does not run
    assert [capture.offer("m", b"1234", None) for _ in range(4)] == [True, True, False, False]
    assert capture.counts["dropped"] == 2


def test_what_is_removed_is_gone_from_the_disk_too(make: Make, tmp_path: Path) -> None:
    capture = make()
    capture.offer("m", b"1", None)
    capture.offer("n", b"2", None)
    written(capture, 2)
    assert capture.remove("m") == 1 and capture.remove("m") == 0
    assert not list((tmp_path / "captured" / "m").iterdir()) and list(capture.held()) == ["n"]
    with pytest.raises(NotFoundError, match="no captured requests of m"):
        capture.pack("m", 10, io.BytesIO())
    for name in ("..", "../n", ".", ""):
        with pytest.raises(UsageError, match="is not a model name"):
            capture.remove(name)
        with pytest.raises(UsageError, match="is not a model name"):
            capture.pack(name, 1, io.BytesIO())


@contextmanager
def stopped(monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> Iterator[threading.Event]:
    """Within, every call of that method waits; the event says that one does."""
    inside, go = threading.Event(), threading.Event()
    original = getattr(owner, name)

    def waiting(*args: object, **kwargs: object) -> object:
        inside.set()
        assert go.wait(60)
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, waiting)
        try:
            yield inside
        finally:
            go.set()


def test_what_still_waits_for_the_disk_is_removed_with_the_rest(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    capture = make()
    with ThreadPoolExecutor() as pool:
        with stopped(monkeypatch, Capture, "_write") as writing:
            capture.offer("m", b"1", None)
            capture.offer("m", b"2", None)
            assert writing.wait(30)
            removing = pool.submit(capture.remove, "m")
            until(lambda: removing.done() or capture._queue.qsize() == 2)
        assert removing.result(30) == 2
    written(capture, 2)
    assert not capture.held() and not list((tmp_path / "captured" / "m").iterdir())


def test_what_an_earlier_process_left_is_removed_also_before_it_was_found(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "captured" / "m"
    place.mkdir(parents=True)
    (place / name_of(int(NOW * 1e9), None)).write_bytes(b"1")
    with ThreadPoolExecutor() as pool:
        with stopped(monkeypatch, Capture, "_find"):
            capture = make()
            removing = pool.submit(capture.remove, "m")
            until(lambda: removing.done() or capture._queue.qsize() == 1)
        assert removing.result(30) == 1
    assert not list(place.iterdir())


def test_a_removal_that_the_disk_holds_up_says_so(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capturing, "REMOVE_SECONDS", 0.05)
    capture = make()
    client = TestClient(create_pages(serve().serving, nudge=no_nudge, info=dict, routers=[router(capture)]))
    with stopped(monkeypatch, Capture, "_write") as writing:
        capture.offer("m", b"1", None)
        assert writing.wait(30)
        with pytest.raises(UnavailableError, match="of m are not all removed yet"):
            capture.remove("m")
        answer = client.delete("/api/v2/captured/m")
        assert answer.status_code == 503 and "not all removed yet" in answer.json()["error"]
    until(lambda: capture.counts["kept"] == 1 and not capture.held())


def test_a_removal_counts_only_what_is_gone(make: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    capture = make()
    capture.offer("m", b"1", None)
    capture.offer("m", b"2", None)
    written(capture, 2)
    (first, _) = sorted((tmp_path / "captured" / "m").iterdir())
    first.unlink()
    first.mkdir()  # no file any more: it cannot be unlinked
    assert capture.remove("m") == 1
    assert "could not be removed" in caplog.text


def test_while_files_are_removed_nobody_waits_for_the_disk(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    capture = make(requests=1)
    capture.offer("m", b"1", None)
    written(capture, 1)
    with ThreadPoolExecutor() as pool, stopped(monkeypatch, Path, "unlink") as removing:
        capture.offer("m", b"22", None)
        assert removing.wait(30)
        asked = pool.submit(lambda: (capture.offer("n", b"3", None), capture.held()["m"].bytes))
        assert asked.result(30) == (True, 2)
    written(capture, 3)


def test_an_entry_that_cannot_be_read_costs_the_others_nothing(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    home = tmp_path / "captured"
    for name in ("a", "b", "c"):
        (home / name).mkdir(parents=True)
        for number in range(3):
            (home / name / name_of(int(NOW * 1e9) + number, None)).write_bytes(b"1")
    (home / "b" / "0-.v2.new").mkdir()
    (home / "b" / "1-.v2").symlink_to(tmp_path / "nowhere")
    (home / "b" / "2-.v2").mkdir()
    listing = Path.iterdir

    def listed(path: Path) -> Iterator[Path]:
        if path == home / "a":
            raise PermissionError(13, "Permission denied", str(path))
        return listing(path)

    monkeypatch.setattr(Path, "iterdir", listed)
    capture = make(requests=2)
    until(lambda: {name: held.requests for name, held in capture.held().items()} == {"b": 2, "c": 2})
    assert capture.remove("c") == 2, "its thread is alive"
    assert "cannot be read: [Errno 13] Permission denied" in caplog.text and "2 files among" in caplog.text


# --- clocks that are wrong


def test_after_a_clock_was_set_back_requests_are_named_by_it_and_those_from_the_future_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capturing, "_LOOK_SECONDS", 0.01)
    now = [int((NOW + 3600) * 1e9)]
    capture = Capture(tmp_path, SimpleNamespace(share=1.0, requests=9, max_mb=1, days=1.0), wall_ns=lambda: now[0])
    capture.start()
    try:
        capture.offer("m", b"ahead", None)
        written(capture, 1)
        now[0] = int(NOW * 1e9)
        capture.offer("m", b"right", None)
        written(capture, 2)
        until(lambda: capture.held()["m"].requests == 1)
        assert capture.held()["m"].newest == NOW and bodies(capture) == [b"right"]
        assert len(list((tmp_path / "m").iterdir())) == 1
    finally:
        capture.end(seconds=10)


def test_what_is_found_from_far_ahead_of_the_clock_goes_and_what_a_little_ahead_stays(
    make: Make, tmp_path: Path
) -> None:
    place = tmp_path / "captured" / "m"
    place.mkdir(parents=True)
    for seconds in (-60, 60, 3600):
        (place / name_of(int((NOW + seconds) * 1e9), None)).write_bytes(b"%d" % seconds)
    capture = make()
    until(lambda: capture.held() and capture.held()["m"].requests == 2)
    assert bodies(capture) == [b"-60", b"60"]


def test_no_request_takes_the_name_of_another_where_the_clock_shows_a_time_again(tmp_path: Path) -> None:
    times = [NOW, NOW + 10, NOW]
    capture = Capture(
        tmp_path,
        SimpleNamespace(share=1.0, requests=9, max_mb=1, days=1.0),
        wall_ns=lambda: int((times.pop(0) if len(times) > 1 else times[0]) * 1e9),
    )
    for body in (b"1", b"2", b"3"):
        capture.offer("m", body, None)
    capture.start()
    try:
        written(capture, 3)
        into = io.BytesIO()
        assert capture.pack("m", 9, into) == 3
        with zipfile.ZipFile(into) as archive:
            assert sorted(archive.read(name) for name in archive.namelist()) == [b"1", b"2", b"3"]
        assert capture.held()["m"].requests == 3
    finally:
        capture.end(seconds=10)


def test_a_clock_that_is_corrected_by_less_than_a_second_keeps_the_order(tmp_path: Path) -> None:
    times = [NOW, NOW - 0.5]
    capture = Capture(
        tmp_path,
        SimpleNamespace(share=1.0, requests=9, max_mb=1, days=1.0),
        wall_ns=lambda: int((times.pop(0) if len(times) > 1 else times[0]) * 1e9),
    )
    capture.offer("m", b"1", None)
    capture.offer("m", b"2", None)
    capture.start()
    try:
        written(capture, 2)
        assert bodies(capture) == [b"1", b"2"]
    finally:
        capture.end(seconds=10)


def test_what_the_stable_version_answered_is_kept_and_nothing_else(make: Make) -> None:
    capture = make()

    async def run() -> None:
        stable, candidate = load(version="1"), load(version="2")
        server = serve(
            stable,
            candidate,
            route=Route("m", 1, "1", candidate="2", weight=0.5),
            random=iter([0.9, 0.1, 0.9]).__next__,
        )
        server.serving.capture = capture
        try:
            assert (await server.infer(1, 2)).headers["x-model-version"] == "1"
            assert (await server.infer(3, 4)).headers["x-model-version"] == "2"
            assert (await server.infer(5, 6, version="1")).status == 200  # not by the route
            assert (await server.post("/v2/models/m/infer", {"inputs": []})).status == 400
        finally:
            close(stable, candidate)

    asyncio.run(run())
    written(capture, 1)
    assert [orjson.loads(body) for body in bodies(capture)] == [request(1, 2)]


def test_the_share_decides(make: Make) -> None:
    capture = make(share=0.25)
    draws = iter([0.1, 0.3, 0.24, 0.9])
    capture._random = lambda: next(draws)
    assert [capture.wants() for _ in range(4)] == [True, False, True, False]


def test_the_pages_list_hand_out_and_remove(make: Make) -> None:
    capture = make(share=0.5)
    serving = serve().serving
    app = create_pages(serving, nudge=no_nudge, info=dict, routers=[router(capture)])
    client = TestClient(app)
    assert client.get("/api/v2/captured").json() == {"share": 0.5, "counts": {}, "models": {}}
    none = client.get("/api/v2/captured/m")
    assert none.status_code == 404 and "no captured requests of m" in none.json()["error"]
    capture.offer("m", b"one", None)
    capture.offer("m", b"two", 2)
    written(capture, 2)
    listed = client.get("/api/v2/captured").json()["models"]["m"]
    assert (listed["requests"], listed["bytes"]) == (2, 6) and NOW <= listed["oldest"] <= listed["newest"] < NOW + 1
    answer = client.get("/api/v2/captured/m", params={"newest": 1})
    assert answer.headers["content-type"] == "application/zip"
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        (name,) = archive.namelist()
        assert archive.read(name) == b"two" and parse_name(name) == (int(NOW * 1e9) + 1, 2)
    assert client.get("/api/v2/captured/m", params={"newest": 0}).status_code == 422
    assert client.delete("/api/v2/captured/m").json() == {"removed": 2}
    assert client.delete("/api/v2/captured/no..name").status_code == 400
