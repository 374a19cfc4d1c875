"""`garage serve` as a process: honest about its start, refused where the memory is too small, quick, and warm when it is ready."""

import json
import subprocess
import sys
import urllib.request

import pytest

from garage.cli import main
from garage.recipes.endpoint import Endpoint


@pytest.fixture
def served():
    """Start `garage serve nano` with options; gives the process and its first line of JSON."""
    started = []

    def start(*options):
        words = [sys.executable, "-m", "garage", "serve", "nano", "--port", "0", "--json", *options]
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(process)
        return process, json.loads(process.stdout.readline())

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_it_says_what_each_phase_took_and_answers_when_it_says_so(served):
    process, ready = served()
    assert list(ready["phases"]) == ["imports", "native code", "memory", "tokenizer", "weights", "layout", "cache", "warm-up", "listening"]
    assert all(seconds >= 0 for seconds in ready["phases"].values()) and ready["phases"]["imports"] > 0.1
    with urllib.request.urlopen(ready["url"].removesuffix("/v1") + "/ready", timeout=10) as reply:
        assert reply.status == 200
    status, answer = Endpoint(ready["url"], ready["model"]).post("/chat/completions", {"model": "nano", "max_tokens": 4, "messages": [
        {"role": "user", "content": "What is 2 plus 2?"}]})  # fmt: skip
    assert status == 200 and answer["choices"][0]["message"]["content"]
    assert "Ctrl-C stops" in process.stdout.readline()
    process.terminate()
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130 and "null" not in out
    assert "weights 8.0 MB" in err and "256 requests of 2048" in err


def test_torch_s_compiler_is_not_imported():
    """It costs more than torch itself."""
    code = (
        "import sys; from garage.recipes.serve import *; e = open_engine(locate('nano'), EngineSpec()); warm_up(e);"
        "holding(config_of(locate('nano').base), EngineSpec(), 'cpu'); print('torch._dynamo' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == ["False", "False"]
    code = "import sys, torch.nn.attention.varlen; print('torch._dynamo' in sys.modules)"
    twin = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert twin.stdout.strip() == "True", "the check cannot tell"


def test_too_little_memory_is_refused_with_what_to_change(capsys):
    assert main(["serve", "nano", "--port", "0", "--engine.kv_cache_bytes", str(1 << 50)]) == 2
    err = capsys.readouterr().err
    assert "keys and values 1125899.91 GB" in err and "are free" in err and "try --engine.kv_cache_bytes" in err


def test_a_dry_run_counts_without_loading(capsys):
    assert main(["serve", "nano", "--dry-run", "--json", "--engine.kv_cache_bytes", "10000000", "--engine.quantization", "int8"]) == 0
    plan = json.loads(capsys.readouterr().out.splitlines()[-1])["plan"]
    assert plan["total"] == sum(plan[name] for name in ("weights", "keys and values", "a step", "process"))
    assert 9_900_000 < plan["keys and values"] <= 10_000_000 and plan["tokens"] == plan["keys and values"] // (2 * 4 * 2 * 64 * 2)


def test_adapters_that_are_none_are_refused_by_name(capsys):
    for words, says in ((["nonsense"], "no name=DIRECTORY"), (["nano=x"], "the name of the model"), (["a=nowhere"], "nowhere")):
        assert main(["serve", "nano", "--port", "0", "--lora_modules", *words]) == 2
        assert says in capsys.readouterr().err
