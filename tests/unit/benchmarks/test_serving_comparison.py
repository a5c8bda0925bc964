"""The comparison of servers: what wrk prints is read right, ratios are those of a round, tables and marks say what was found. Nothing is timed."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest

from benchmarks import _report, _servers
from benchmarks._report import (
    ALONE,
    BATCHER,
    HEAVY,
    OURS,
    SMALL,
    SMALL_28,
    TRITON,
    Found,
    case,
    document,
    judge,
    markdown,
)
from benchmarks._turns import (
    Mark,
    Spread,
    Target,
    Turn,
    at_least,
    at_most,
    in_turns,
    lua,
    marks_table,
    rates_table,
    ratios,
    read_result,
    spread,
    table,
)


def turn(rate: float, p99: float = 0.001, failed: int = 0) -> Turn:
    return Turn(rate, p99 / 2, p99, 2 * p99, failed)


def found() -> Found:
    """A run in which ours does 3,000 a second and Triton 1,000."""
    one = Found(versions={OURS: "abc", TRITON: "wheel", BATCHER: "wheel"})
    both = {OURS: [turn(3000.0), turn(3000.0)], TRITON: [turn(1000.0), turn(1000.0)], BATCHER: [turn(2000.0)]}
    for kind in ("json", "binary"):
        for model, connections in product((SMALL, SMALL_28), (1, 16, 64)):
            one.cases[case(model, kind, connections)] = dict(both)
        one.cases[case(HEAVY, kind, 16)] = {**both, ALONE: [turn(3500.0)]}
    for connections in (16, 64):
        one.cases[f"cache hit, JSON, {connections}"] = {OURS: [turn(10.0)], BATCHER: [turn(20.0)]}
        one.cases[f"cache hit, 28x28, JSON, {connections}"] = {OURS: [turn(30.0)], BATCHER: [turn(20.0)]}
    swaps = {
        "swaps": 3, "requests": 1000, "failed": 0, "wrong": 0, "usual_slowest_seconds": 0.01, "slowest_seconds": 0.03,
        "swap_seconds": 0.2, "held_back": 4, "held_back_longest_seconds": 0.07,
    }  # fmt: skip
    one.others = {
        "memory_at_rest_bytes": {OURS: 100 << 20},
        "health_under_load": {f"{OURS} /health, small": {"p50_seconds": 0.001, "p99_seconds": 0.06, "probes": 300}},
        "start": {"first_answer_seconds": [1.4, 1.5]},
        "swaps": swaps,
        "swaps_one_version": {**swaps, "failed": 1},
        "features": {
            "keys": {
                f"{kind}, {which}": [turn(rate)]
                for kind in ("JSON", "binary")
                for which, rate in (("with", 8000.0), ("without", 10_000.0))
            }
        },
        "growth": {"1 loaded": {"JSON": [turn(10_000.0)], "binary": [turn(20_000.0)]}},
    }
    return one


ABOUT = {
    "date": "2026-01-01",
    "commit": "abc",
    "machine": "m",
    "load_before": 0.1,
    "seconds": 9,
    "rounds": 2,
    "peer_rounds": 1,
}


def mark(name: str) -> Mark:
    return next(one for one in judge(found()) if one.name == name)


def test_what_wrk_printed_is_read() -> None:
    read, requests = read_result("Running 1s test\n  lots of words\nRESULT 5000 2000000 150 900 4000 3\n")
    assert read == Turn(2500.0, 0.00015, 0.0009, 0.004, 3)
    assert requests == 5000


def test_output_without_a_result_is_an_error_that_shows_it() -> None:
    with pytest.raises(ValueError, match="unable to connect"):
        read_result("unable to connect to 127.0.0.1:1")


def test_a_request_keeps_its_length_whatever_fresh_number_is_in_it() -> None:
    for kind in ("json", "binary"):
        target = _servers.v2_target("127.0.0.1:1", "/v2/models/m/infer", kind, fresh=True)
        assert target.fresh is not None
        offset, length = target.fresh
        if kind == "json":
            assert target.body[offset - 2 : offset] == b"0."
            fresh = target.body[:offset] + b"1" * length + target.body[offset + length :]
            assert json.loads(fresh)["inputs"][0]["data"][0] == pytest.approx(0.1111111)
        else:
            assert offset == int(target.headers["Inference-Header-Content-Length"])
        script = lua(target, Path("/tmp/body"), 7)
        assert f"body:sub(1, {offset}), body:sub({offset + length + 1}), 7" in script


def test_headers_and_paths_are_quoted_in_the_script() -> None:
    script = lua(Target("a:1", "/", b"", {"X": 'say "hi"\\'}), Path("/tmp/body"), 0)
    assert 'wrk.headers["X"] = "say \\"hi\\"\\\\"' in script
    assert "request = function" not in script, "equal requests cost wrk nothing"


def test_each_server_has_its_turn_in_every_round_and_another_one_is_first_in_each() -> None:
    order: list[str] = []

    def one(name: str) -> Turn:
        order.append(name)
        return turn(1.0)

    turns = in_turns(("a", "b", "c"), 3, one, fewer={"c": 1})
    assert order == ["a", "b", "c", "b", "a", "a", "b"]
    assert {name: len(got) for name, got in turns.items()} == {"a": 3, "b": 3, "c": 1}


def test_ratios_are_of_turns_of_the_same_round() -> None:
    ours, theirs = [turn(100.0), turn(400.0), turn(90.0)], [turn(50.0), turn(100.0)]
    assert ratios(ours, theirs, "requests_per_second") == Spread(3.0, 2.0, 4.0)


def test_nothing_has_no_median() -> None:
    with pytest.raises(ValueError, match="nothing"):
        spread([])


def test_a_mark_is_met_by_its_median_in_its_own_direction() -> None:
    around = Spread(1.5, 1.0, 2.0)
    assert at_least("rate", 1.4, around).met is True
    assert at_least("rate", 1.6, around).met is False
    assert at_most("p99", 1.6, around).met is True
    assert at_most("p99", 1.4, around).met is False


def test_a_table_refuses_rows_of_another_width_and_quotes_bars() -> None:
    assert table(("a", "b"), [("1|2", "3")]) == "| a | b |\n| --- | --- |\n| 1\\|2 | 3 |"
    with pytest.raises(ValueError, match="1 cells under a head of 2"):
        table(("a", "b"), [("1",)])


def test_rates_show_the_median_and_a_dash_where_a_server_has_no_such_case() -> None:
    shown = rates_table(
        {"small": {"ours": [turn(1000.0, 0.002), turn(3000.0, 0.004), turn(2000.0, 0.003)]}}, ("ours", "x")
    )
    assert shown.splitlines()[-1] == "| small | 2,000 (3.0) | – |"


def test_the_marks_compare_with_triton_as_it_is_and_with_its_batcher() -> None:
    assert mark("JSON, 16: rate against Triton").met is True, "3 >= 2"
    assert mark("JSON, 16: rate against Triton, batcher").met is False, "1.5 < 2"
    assert mark("binary, 64: rate against Triton, batcher").met is True, "1.5 >= 1.4"
    assert mark("heavy model, JSON, 16: rate against ONNX Runtime's own at batch 16").met is True
    assert mark("cache hit, JSON, 16: rate against Triton, batcher").met is False
    assert mark("cache hit, 28x28, JSON, 16: rate against Triton, batcher").met is True
    assert mark("p99 of /health, small model under full load").met is False, "60 ms"
    assert any(one.met is False and "memory for one version" in one.name for one in judge(found())), "one failed"


def test_a_mark_without_triton_is_not_measured_rather_than_met() -> None:
    without = found()
    for turns in without.cases.values():
        turns.pop(TRITON, None)
    marks = [one for one in judge(without) if one.name.endswith("against Triton")]
    assert marks
    assert all(one.met is None and "could not be started" in one.why for one in marks)


def test_everything_found_is_in_the_tables_and_in_the_document() -> None:
    marks = judge(found())
    text = markdown(found(), marks, ABOUT)
    assert "Triton as PyPI has it" in text
    assert marks_table(marks) in text
    assert "| keys | +25.0 (+25.0 to +25.0) | +25.0 (+25.0 to +25.0) |" in text, "1e6/8,000 - 1e6/10,000 microseconds"
    whole = json.loads(json.dumps(document(found(), marks, ABOUT)))
    assert len(whole["marks"]) == len(marks)
    assert whole["cases"][case(SMALL, "json", 16)][OURS][0]["requests_per_second"] == 3000.0


def test_the_models_are_the_same_for_everybody_and_take_what_the_requests_send(tmp_path: Path) -> None:
    import numpy as np
    import onnxruntime

    model = _servers.conv_model(tmp_path / "m.onnx", (8, 16))
    again = _servers.conv_model(tmp_path / "again.onnx", (8, 16))
    assert model.read_bytes() == again.read_bytes()
    target = _servers.v2_target("a:1", "/", "json")
    image = np.array(json.loads(target.body)["inputs"][0]["data"], dtype=np.float32).reshape(1, 1, 8, 8)
    session = onnxruntime.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    assert session.run(None, {"image": image})[0].shape == (1, 10)


def test_marks_that_others_measure_say_where() -> None:
    assert all(why for _, _, why in _report.ELSEWHERE)
