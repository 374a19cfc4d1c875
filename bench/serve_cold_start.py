"""From the command to the first token over HTTP, beside vLLM's CPU build: what a person waits for.

A side is started as a process on a free loopback port, asked until it answers, and sent one streamed request; the clock runs from the start
of the process to the first piece of text. Ours says its phases itself (`garage serve --json`). Weights are random, of the 135M shape, in
the page cache for both; our kernels are compiled already (the first start of a machine compiles for some seconds; `native` says how long).
`models` has larger shapes in 16, 8 and 4 bits, with the memory that the process has to itself: its peak until it is ready, and what it then
holds. Medians of the rounds. Claims: at most 5 s for ours, and in 4 bits a peak of at most a quarter over what is held.

    python bench/serve_cold_start.py --vllm-python V/bin/python      stores bench/results/serve_cold_start.json
    python bench/serve_cold_start.py --smoke                         one start of a tiny shape; stores nothing
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

from record import record, typed
from serving import ROOT, model_dir

BODY = {"model": "bench", "prompt": list(range(100, 164)), "max_tokens": 4, "temperature": 0, "stream": True}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vllm-python")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    directory = model_dir("tiny" if options.smoke else "qwen3-135m")
    ours = [garage(directory) for _ in range(1 if options.smoke else options.rounds)]
    figures: dict[str, Any] = {"garage": summary(ours), "raw": {"garage": ours}}
    if not options.smoke:
        pairs = [(name, bits) for name in ("qwen3-0.6b", "gemma3-1b") for bits in ("none", "int8", "int4")]
        figures["models"] = {f"{name}, {bits}": larger(name, bits) for name, bits in pairs}
        figures["native"] = compile_seconds(directory)
        if options.vllm_python:
            figures["raw"]["vllm"] = [vllm(directory, options.vllm_python) for _ in range(2)]
            figures["vllm"] = summary(figures["raw"]["vllm"])
            figures["vllm_over_garage"] = round(figures["vllm"]["first_token"] / figures["garage"]["first_token"], 1)
    print(json.dumps(figures, indent=1))
    if options.smoke:
        return 0
    print(record("serve_cold_start", typed(), figures))
    is_lean = all(row["peak_mib"] <= 1.25 * row["held_mib"] for name, row in figures["models"].items() if name.endswith("int4"))
    return 0 if figures["garage"]["first_token"] <= 5 and is_lean else 1


def larger(name: str, bits: str) -> dict[str, Any]:
    """Medians of three starts of a larger shape, and the size of its file."""
    directory = model_dir(name)
    runs = [garage(directory, "--engine.quantization", bits) for _ in range(3)]
    size = sum(file.stat().st_size for file in directory.glob("*.safetensors")) >> 20
    return summary(runs) | {"file_mib": size}


def garage(directory: Path, *words: str, **environment: str) -> dict[str, Any]:
    """Seconds until it is ready and until the first token, MiB of memory, and its own phases."""
    command = [sys.executable, "-m", "garage", "serve", str(directory), "--port", "0", "--served-model-name", "bench", "--json", *words]
    began = time.perf_counter()
    with started(command, {"PYTHONPATH": str(ROOT), **environment}) as process, ThreadPoolExecutor() as beside:
        assert process.stdout
        line = beside.submit(next, (line for line in process.stdout if line.startswith("{")))
        peak = 0
        while not line.done():
            peak = max(peak, own_mib(process.pid))
            time.sleep(0.01)
        ready, at = json.loads(line.result()), time.perf_counter() - began
        first_token(ready["url"])
        first = time.perf_counter() - began
        return {"ready": at, "first_token": first, "peak_mib": peak, "held_mib": own_mib(process.pid), "phases": ready["phases"]}


def own_mib(process: int) -> int:
    """Memory that is the process's own: without the pages of files, which the system may take back."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next((int(line.split()[1]) >> 10 for line in lines if line.startswith("RssAnon:")), 0)


def vllm(directory: Path, python: str) -> dict[str, Any]:
    """The same for `vllm serve`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(directory), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--served-model-name", "bench", "--dtype", "bfloat16", "--max-model-len", "2048"]
    began = time.perf_counter()
    with started(command, {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}) as process:
        while not answers(f"http://127.0.0.1:{port}/health"):
            assert process.poll() is None and time.perf_counter() - began < 400, "vLLM did not start"
            time.sleep(0.05)
        at = time.perf_counter() - began
        first_token(f"http://127.0.0.1:{port}/v1")
        return {"ready": at, "first_token": time.perf_counter() - began}


class started:
    """A process that is stopped at the end, whatever becomes of it."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self._command, self._environment = command, {**os.environ, "OMP_NUM_THREADS": "2", **environment}

    def __enter__(self) -> subprocess.Popen[str]:
        pipe, none = subprocess.PIPE, subprocess.DEVNULL
        self._process = subprocess.Popen(self._command, stdout=pipe, stderr=none, text=True, env=self._environment)
        return self._process

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def first_token(url: str) -> None:
    """Returns when the first piece of the answer is there."""
    request = urllib.request.Request(f"{url}/completions", json.dumps(BODY).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as reply:
        next(line for line in reply if line.startswith(b"data: {"))


def compile_seconds(directory: Path) -> float:
    """What the first start on a machine takes longer."""
    with tempfile.TemporaryDirectory() as empty:
        return float(garage(directory, XDG_CACHE_HOME=empty)["phases"]["native code"])


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    out: dict[str, Any] = {name: round(median(run[name] for run in runs), 2) for name in runs[0] if name != "phases"}
    if "phases" in runs[0]:
        out["phases"] = {name: round(median(run["phases"][name] for run in runs), 3) for name in runs[0]["phases"]}
    return out


if __name__ == "__main__":
    sys.exit(main())
