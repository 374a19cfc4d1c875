"""The floors that GPU results are compared with are the documented ones, and each piece of the bench runs (a tiny shape, on the CPU)."""

import importlib
import json
import sys
from pathlib import Path

import pytest

from garage.models.families import named

BENCH = Path(__file__).parents[2] / "bench"
DOCUMENTED = {  # tokens/s on an H200: the 256 requests; decoding at 1,024 tokens of context by batch; prompts
    "qwen3-0.6b": (36_303, (3284, 16_139, 27_798, 31_603, 34_697), 897_000),
    "qwen3-8b": (12_715, (281, 2105, 6891, 11_097, 18_425), 56_900),
    "qwen3-14b": (8093, (153, 1173, 4126, 7108, 13_435), 29_900), "gemma3-1b": (109_545, (2134, 16_186, 54_978, 91_546, 161_581), 566_000),
    "gemma3-4b": (19_971, (544, 3865, 11_166, 16_297, 23_263), 123_000), "gemma3-12b": (6701, (180, 1286, 3779, 5582, 8102), 36_700),
}  # fmt: skip


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    yield importlib.import_module("gpu_serve")
    for name in ("gpu_serve", "record"):
        sys.modules.pop(name, None)


def test_the_requests_are_nano_vllms(bench):
    prompts, outs = bench.requests()
    assert (len(prompts), sum(map(len, prompts)), sum(outs)) == (256, 142_827, 133_966)


def test_the_floors_are_the_documented_ones(bench):
    found = {each["model"]: each for each in bench.floors()}
    assert found.keys() == DOCUMENTED.keys()
    for name, (requests, decode, prefill) in DOCUMENTED.items():
        assert found[name]["requests_tokens_per_s"] == requests
        assert tuple(found[name]["decode_tokens_per_s"].values()) == decode
        assert abs(found[name]["prefill_tokens_per_s"] / prefill - 1) < 1e-3


def test_a_floor_without_windows_is_another(bench):
    c = named("gemma3-1b")
    assert bench.cache_bytes(c, 1024) == 4 * 256 * (4 * 1024 + 22 * 512) < 4 * 256 * 26 * 1024


@pytest.mark.parametrize("piece", [["requests"], ["requests", "--kv", "fp8", "--quantization", "int8"], ["decode"]])
def test_each_piece_runs(bench, piece, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench/gpu_serve.py", *piece, "--smoke"])
    monkeypatch.setattr(bench, "record", lambda *a: pytest.fail("a smoke run stores nothing"))
    assert bench.main() == 0
    found = json.loads(capsys.readouterr().out)["found"]
    assert all(each["tokens_per_s"] > 0 for each in (found if isinstance(found, list) else [found]))
