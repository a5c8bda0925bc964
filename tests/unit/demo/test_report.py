"""What counts as what: the classes of a request, the figures of the summary, and the page that shows them."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modelkeep.demo import report
from modelkeep.demo.answers import Request, check, read_log
from modelkeep.demo.charts import timeline
from registry.policy import PromotionPolicy

LABELS = np.array([3, 5], np.int64)


class Versions:
    """Two versions that answer with the label, and "4", which raises on image 1."""

    def knows(self, version: str | None) -> bool:
        return version in ("1", "2", "4")

    def error(self, version: str, image: int) -> str | None:
        return "Gather: out of range" if version == "4" and image == 1 else None

    def scores(self, version: str, image: int) -> np.ndarray[Any, np.dtype[np.float32]] | None:
        if self.error(version, image):
            return None
        return (np.arange(10) == LABELS[image]).astype(np.float32) * int(version)


DIRECT: Any = Versions()


def request(at: float = 1.0, **changes: Any) -> Request:
    version, image = changes.get("version", "1"), changes.get("image", 0)
    facts: dict[str, Any] = {
        "index": 0,
        "image": image,
        "binary": False,
        "scheduled": at,
        "sent": at,
        "finished": at + 0.002,
        "status": 200,
        "error": None,
        "version": version,
        "answer": None,
        "message": None,
    } | changes
    if facts["error"] is None and "answer" not in changes:
        facts["answer"] = DIRECT.scores(version, image)
    return Request(**facts)


def write_log(path: Path, requests: list[Request], *, end: bool = True) -> Path:
    lines: list[dict[str, Any]] = [{"kind": "start", "monotonic": 100.0, "wall": 1.7e9, "rate": 300.0, "seed": 1}]
    for number, r in enumerate(requests):
        line = {name: getattr(r, name) for name in Request.__slots__} | {"index": number}
        line["answer"] = None if r.answer is None else base64.b64encode(r.answer.astype("<f4").tobytes()).decode()
        lines.append(line)
    if end:
        lines.append(
            {"kind": "end", "monotonic": 200.0, "sent": len(requests), "max_lateness_seconds": 0.01, "cpu_seconds": 1.0}
        )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


WINDOW = report.CanaryWindow("4", 10.0, 12.0)
KILL = report.Kill(20.0, 20.01)
CRASH = {"status": 500, "error": "http 500", "version": "4"}
BROKEN = {"status": None, "error": "eof", "version": None}


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (request(11.0), report.ANSWERED),
        (request(11.0, **CRASH), report.FAILED_IN_CANARY),
        (request(11.999, finished=12.3, **CRASH), report.FAILED_IN_CANARY),
        (request(12.1, **CRASH), report.FAILED),
        (request(9.0, **CRASH), report.FAILED),
        (request(11.0, status=500, error="http 500", version="2"), report.FAILED),
        (request(11.0, status=500, error="http 500", version=None), report.FAILED),
        (request(11.0, status=400, error="http 400", version="4"), report.FAILED),
        (request(11.0, status=None, error="timeout", version=None), report.FAILED),
        (request(19.99, finished=20.02, **BROKEN), report.LOST_TO_KILL),
        (request(19.99, finished=20.02, status=None, error="reset", version=None), report.LOST_TO_KILL),
        (request(19.90, finished=19.95, **BROKEN), report.FAILED),
        (request(20.10, finished=20.12, **BROKEN), report.FAILED),
        (request(19.99, finished=25.0, **BROKEN), report.FAILED),
        (request(19.99, finished=20.02, status=None, error="refused", version=None), report.FAILED),
        (request(19.99, finished=20.02, status=None, error="timeout", version=None), report.FAILED),
        (request(19.99, finished=20.02, status=503, error="http 503", version="2"), report.FAILED),
    ],
    ids=[
        "answered",
        "the candidate's 500",
        "under way as the window closed",
        "after the window",
        "before the window",
        "the stable version's 500",
        "a 500 of nobody",
        "the candidate's 400",
        "a time-out in the window",
        "end of stream at the kill",
        "reset at the kill",
        "broken before the kill",
        "sent after the kill",
        "broken much later",
        "refused at the kill",
        "timed out at the kill",
        "answered 503 at the kill",
    ],
)
def test_a_request_has_one_class(made: Request, expected: str) -> None:
    assert report.outcome(made, [WINDOW], [KILL]) == expected


def test_quantiles_are_values_that_were_measured() -> None:
    assert report.quantiles([0.001 * n for n in range(1, 101)]) == {
        "p50_seconds": 0.05,
        "p95_seconds": 0.095,
        "p99_seconds": 0.099,
        "max_seconds": 0.1,
    }
    assert report.quantiles([]) == {}


def test_an_answer_of_another_version_than_it_names_is_wrong() -> None:
    honest = request(version="2")
    swapped = request(version="2", answer=DIRECT.scores("1", 0))
    other_digit = request(version="2", answer=DIRECT.scores("2", 1))
    nobody = request(version="9", answer=DIRECT.scores("1", 0))
    impossible = request(version="4", image=1, answer=DIRECT.scores("1", 1))
    found = check([honest, swapped, other_digit, nobody, impossible, request(**CRASH)], DIRECT)
    assert (found.checked, found.wrong) == (5, 4)
    assert "differ by up to 1" in found.examples[0]
    assert "digit 5, expected 3" in found.examples[1]
    assert "no such version" in found.examples[2]
    assert "raises on this image" in found.examples[3]


def test_rounding_of_a_batch_is_not_a_wrong_answer() -> None:
    answer = DIRECT.scores("2", 0) + np.float32(5e-5)
    assert check([request(version="2", answer=answer)], DIRECT).wrong == 0


def test_a_last_line_cut_short_is_left_out_and_said(tmp_path: Path) -> None:
    path = write_log(tmp_path / "log", [request(), request()], end=False)
    path.write_text(path.read_text() + '{"index": 2, "ima')
    log = read_log(path)
    assert len(log.requests) == 2
    assert log.end is None


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = write_log(tmp_path / "log", [request()])
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "broken", *lines[1:]]) + "\n")
    with pytest.raises(ValueError, match="line 2"):
        read_log(path)


def test_a_file_that_is_no_log_is_refused(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("")
    with pytest.raises(ValueError, match="no opening line"):
        read_log(tmp_path / "log")


EVENTS: list[dict[str, Any]] = [
    {"t": 90.0, "kind": "step", "version": None, "title": "Getting ready", "detail": "", "figures": {}},
    {"t": 91.0, "kind": "refused", "version": "6", "title": "a pickle", "detail": "<script>alert(1)</script>", "figures": {}},
    {"t": 100.0, "kind": "step", "version": "4", "title": "v4 & its <canary>", "detail": "", "figures": {}},
    {"t": 110.0, "kind": "stage", "version": "4", "title": "5 %", "detail": "", "figures": {"weight": 0.05}},
    {"t": 112.0, "kind": "withdrawn", "version": "4", "title": "v4 is withdrawn", "detail": "errors",
     "figures": {"evidence": {"error": 412.5, "slower": 1.0}}},
    {"t": 118.0, "kind": "kill", "version": None, "title": "SIGKILL", "detail": "", "figures": {}},
]  # fmt: skip


def made(tmp_path: Path) -> report.Summary:
    requests = [request(100.0 + n / 10, image=n % 2) for n in range(100)]
    requests += [request(110.0 + n / 10, image=n % 2) for n in range(18)]
    requests += [request(111.85, image=1, **CRASH), request(111.9, image=0, version="4")]
    requests += [request(117.99, finished=118.02, **BROKEN), request(118.5, status=None, error="refused", version=None)]
    return report.summarise(
        write_log(tmp_path / "log", requests),
        events=EVENTS,
        kills=[(118.0, 118.01)],
        canary_windows=[("4", 110.0, 112.0)],
        direct=DIRECT,
        labels=LABELS,
        versions={
            "1": {"name": "v1", "outcome": "promoted", "accuracy": 0.93},
            "4": {"name": "v4", "outcome": "withdrawn", "accuracy": 0.99, "reason": "it fails"},
            "6": {"name": "v6", "outcome": "refused"},
        },
    )


def test_the_summary_counts_each_request_once(tmp_path: Path) -> None:
    summary = made(tmp_path)
    assert summary.requests_total == 122
    assert summary.requests_failed == 1
    assert summary.failures == {"refused": 1}
    assert summary.requests_failed_in_canary == 1
    assert summary.requests_lost_to_kills == 1
    assert summary.answers_wrong == 0
    assert summary.answers["checked"] == 119


def test_a_cut_over_is_counted_by_running_the_candidate_over_the_same_images(tmp_path: Path) -> None:
    (canary,) = made(tmp_path).canaries
    assert canary["requests"] == 20
    assert canary["requests_by_candidate"] == 2
    assert canary["requests_failed_in_canary"] == 1
    assert canary["cutover_failed"] == 10


def test_each_version_has_what_the_story_knows_and_what_the_traffic_saw(tmp_path: Path) -> None:
    versions = made(tmp_path).versions
    assert list(versions) == ["1", "4", "6"]
    assert versions["4"]["outcome"] == "withdrawn"
    assert (versions["4"]["requests"], versions["4"]["answered"], versions["4"]["failed"]) == (2, 1, 1)
    assert versions["1"]["accuracy_live"] == 1.0
    assert versions["1"]["latency"]["p50_seconds"] == 0.002
    assert "accuracy_live" not in versions["6"]  # not measured, so not there


def test_each_step_has_its_requests_and_its_decisions(tmp_path: Path) -> None:
    first, second = made(tmp_path).steps
    assert (first["requests"], second["requests"]) == (0, 122)
    assert [d["kind"] for d in first["decisions"]] == ["refused"]
    assert [d["kind"] for d in second["decisions"]] == ["stage", "withdrawn", "kill"]
    assert second["requests_failed_in_canary"] == 1
    assert second["requests_lost_to_kill"] == 1


def test_the_summary_file_is_json_with_the_agreed_names(tmp_path: Path) -> None:
    path = report.write_summary(made(tmp_path), tmp_path / "demo" / "summary.json")
    found = json.loads(path.read_text())
    agreed = (
        "requests_total requests_failed requests_failed_in_canary requests_lost_to_kills answers_wrong versions steps"
    )
    assert set(agreed.split()) <= set(found)
    assert [p.name for p in path.parent.iterdir()] == ["summary.json"]


def test_a_figure_that_is_no_number_is_not_written(tmp_path: Path) -> None:
    summary = made(tmp_path)
    summary.versions["1"]["accuracy"] = float("nan")
    with pytest.raises(ValueError, match="not JSON compliant"):
        report.write_summary(summary, tmp_path / "summary.json")
    assert not (tmp_path / "summary.json").exists()


def test_an_event_of_an_unknown_kind_names_the_kinds() -> None:
    with pytest.raises(ValueError, match="the kinds are step, register"):
        report.Event.of({"t": 1.0, "kind": "miracle", "title": "x"})


class Balance(HTMLParser):
    """Open elements that were never closed, and every address that the page would load."""

    VOID = frozenset({"meta", "br", "link", "img", "input"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> after {self.open[-5:]}"
        self.open.pop()

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]


def test_the_page_is_whole_escapes_what_it_shows_and_loads_nothing(tmp_path: Path) -> None:
    policy = PromotionPolicy(dwell_seconds=1.0)
    html = report.render_html(made(tmp_path), policy=policy, why={"dwell_seconds": "seconds, not minutes"})
    page = Balance()
    page.feed(html)
    assert page.open == []
    assert page.addresses == []
    assert not re.search(r"https?://|@import|url\(", html)
    assert "<script" not in html
    assert "&lt;script&gt;alert(1)" in html
    assert "v4 &amp; its &lt;canary&gt;" in html
    assert "seconds, not minutes" in html
    assert "evidence error <b>412</b>" in html
    assert "prefers-color-scheme: dark" in html


def test_the_page_says_what_went_wrong_in_its_headline(tmp_path: Path) -> None:
    assert "<h1>1 request failed: this is not as it should be</h1>" in report.render_html(
        made(tmp_path), policy=PromotionPolicy()
    )


def test_without_a_request_the_page_says_so(tmp_path: Path) -> None:
    summary = report.summarise(
        write_log(tmp_path / "log", [], end=False), events=[], direct=DIRECT, labels=LABELS, versions={}
    )
    html = report.render_html(summary, policy=PromotionPolicy())
    assert "<h1>No request was sent</h1>" in html
    assert "nothing to draw" in html
    assert "The story recorded no decision." in html
    assert "no closing line" in html
    assert "Every setting is the default." in html


def test_where_every_request_failed_the_picture_still_stands(tmp_path: Path) -> None:
    log = write_log(tmp_path / "log", [request(1.0, status=None, error="refused", version=None)])
    summary = report.summarise(log, events=[], direct=DIRECT, labels=LABELS, versions={})
    assert "no request was answered" in timeline(summary)
