"""Events: every whole line is read back, a cut one is left out, and no invalid JSON is written."""

import json

from garage.core.events import EventLog, read_events
from garage.core.seeds import derive


def test_events_come_back_in_order_and_reach_listeners(tmp_path):
    heard = []
    log = EventLog(tmp_path / "events.jsonl", heard.append)
    for step in range(3):
        log.emit("metric", step=step, loss=1.5)
    log.close()
    assert [event["step"] for event in read_events(tmp_path / "events.jsonl")] == [0, 1, 2] == [event["step"] for event in heard]


def test_a_cut_line_is_left_out(tmp_path):
    path = tmp_path / "events.jsonl"
    log = EventLog(path)
    log.emit("metric", step=1)
    log.emit("metric", step=2)
    path.write_bytes(path.read_bytes()[:-9])
    assert [event["step"] for event in read_events(path)] == [1]


def test_numbers_that_are_not_finite_become_null_and_a_warning(tmp_path):
    log = EventLog(tmp_path / "e")
    log.emit("metric", step=4, loss=float("nan"))
    text = (tmp_path / "e").read_text()
    assert "NaN" not in text
    metric, warning = map(json.loads, text.splitlines())
    assert metric["loss"] is None and warning["kind"] == "warning" and "loss" in warning["message"] and warning["step"] == 4


def test_streams_are_named_stable_and_far_apart():
    assert derive(0, "batches") == derive(0, "batches")
    seeds = {derive(seed, name, step) for seed in range(10) for name in ("a", "b") for step in range(100)}
    assert len(seeds) == 2000 and max(seeds) < 2**63
    assert derive(1, "2", "3") != derive(1, "23")
