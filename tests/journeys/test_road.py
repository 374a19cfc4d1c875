"""The whole road on the embedded model, by the verbs a person types, with each verb's `--json` keys checked against docs."""

import json
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from garage.recipes.serve import stream_http

DOCUMENTS = Path(__file__).parents[2] / "garage" / "assets" / "examples" / "documents"
SECONDS = 90


def garage(*words: object) -> dict[str, object]:
    done = subprocess.run([sys.executable, "-m", "garage", *map(str, words), "--json"], capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("road")


def test_documents_become_a_served_model(place):
    began = time.process_time() + sum(resource_seconds())
    corpus = garage("ingest", DOCUMENTS, "--out", place / "corpus")
    assert corpus["documents"] == 6 and corpus["failed"] == [] and corpus["chunks"] > 6 and corpus["tokens"] > 1000
    dataset = garage("synthesize", place / "corpus", "--out", place / "dataset", "--rows", 120, "--test_rows", 16)
    assert (dataset["rows"], dataset["test_rows"], dataset["calls"], dataset["missing"]) == (120, 16, 0, 0)
    settings = ["--fit.max_steps", 60, "--fit.batch_tokens", 1024, "--fit.micro_tokens", 1024, "--fit.max_length", 512]
    trained = garage("sft", "nano", "--data", place / "dataset", "--out", place / "run", *settings, "--fit.optimizer.lr", 3e-3)
    assert {"run", "checkpoint", "final", "tokens_per_second", "peak_bytes", "truncated"} <= set(trained)
    asked = ["--task", "custom", "--data", place / "dataset", "--max_tokens", 32]
    found = garage("compare", "nano", place / "run", *asked, "--out", place / "compared")
    assert {"base", "tuned", "delta", "ci95", "p", "gained", "lost"} <= set(found) and found["tuned"] > found["base"]
    for form in ("adapter", "merged"):
        made = garage("export", place / "run", "--format", form, "--out", place / form)
        assert made["certificate"]["ok"] and made["bytes"] > 10_000
    answer = served(place / "merged", "What are the opening hours?")
    assert answer.strip()
    assert time.process_time() + sum(resource_seconds()) - began < 2 * SECONDS  # processor seconds on two cores


def served(model: Path, question: str) -> str:
    command = [sys.executable, "-m", "garage", "serve", str(model), "--port", "0", "--served_model_name", "mine"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        try:
            url = server.stdout.readline().split()[2].removesuffix("/v1")
            assert urllib.request.urlopen(f"{url}/health", timeout=30).status == 200
            return "".join(stream_http(url, "mine", question))
        finally:
            server.terminate()


def resource_seconds() -> tuple[float, float]:
    import resource

    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime, used.ru_stime


def test_the_other_verbs_answer_too(place):
    assert garage("evaluate", "nano", "--task", "worksheets", "--limit", 8, "--max_tokens", 64, "--out", place / "w")["n"] == 8
    rows = garage("synthesize", "--teacher", "worksheets", "--rows", 60, "--out", place / "sheets")
    assert (rows["rows"], rows["test_rows"]) == (60, 200)
    assert garage("dataset", "validate", place / "sheets")["rows"] == 60
    preview = garage("dataset", "preview", place / "sheets", "--rows", 1)
    marks = {token["mark"] for token in preview["rows"][0]}
    assert marks == {"learned", "masked", "template"}
    assert garage("runs", "list", place)["runs"][0]["state"] == "complete"
    assert {check["name"] for check in garage("doctor")["checks"]} >= {"torch", "memory", "disk", "embedded model"}
