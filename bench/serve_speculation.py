"""Guessing ahead on real text: tokens per second and what is kept, where it wins and where it loses.

nano answers greedily, alone and eight at a time, with no guesses, with n-gram look-up, and with look-up that measures itself (`adaptive`).
Three kinds of work: `extract`, paragraphs of the demo's documents that are to be repeated, `solve`, word problems of GSM8K, and `continue`,
plain text that goes on. The 135M shape with random weights soon repeats itself, the best case there is. Texts are compared: with guesses
they are those without (float32). Rounds alternate; medians.

    python bench/serve_speculation.py            stores bench/results/serve_speculation.json (about 3 minutes)
    python bench/serve_speculation.py --smoke    seconds; stores nothing
"""

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from record import record, typed
from serving import NANO, SHARED, model_dir, random_prompts

from garage.core.types import Message, Request, Sampling
from garage.engine.engine import Engine
from garage.specs.serve import EngineSpec

WAYS: dict[str, dict[str, Any]] = {
    "off": {"kind": "off"}, "ngram": {"kind": "ngram", "adaptive": False}, "ngram, adaptive": {"kind": "ngram"},
}  # fmt: skip
OUT = 96


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    figures: dict[str, Any] = {}
    for model, works in (("nano", works_of_nano()), ("qwen3-135m", {"random": random_work()})):
        directory = NANO if model == "nano" else model_dir("tiny" if options.smoke else model)
        engines = {name: Engine.open(directory, None, spec_of(way, exact=model == "nano")) for name, way in WAYS.items()}
        for work, requests in works.items():
            for batch in (1, 8):
                few = requests[: 2 if options.smoke else 8]
                figures[f"{model}, {work}, {batch} at once"] = compared(engines, few, batch, 1 if options.smoke else options.rounds)
    print(json.dumps(figures, indent=1))
    are_same = all(each["same_text"] for name, each in figures.items() if name.startswith("nano"))
    if options.smoke:
        return 0 if are_same else 1
    print(record("serve_speculation", typed(), figures))
    return 0 if are_same else 1


def spec_of(way: dict[str, Any], *, exact: bool) -> EngineSpec:
    return EngineSpec.parse({"device": "cpu", "dtype": "float32" if exact else "bfloat16", "max_num_seqs": 8, "speculation": way,
                             "kv_cache_bytes": 1 << 28, "enable_prefix_caching": False})  # fmt: skip


def works_of_nano() -> dict[str, list[Request]]:
    sampling = Sampling(max_tokens=OUT, ignore_eos=True)
    places = sorted((Path(NANO).parents[0] / "examples" / "documents").glob("*.md"))
    pages = [" ".join(part.split()) for place in places for part in place.read_text(encoding="utf-8").split("\n\n") if len(part) > 80]
    with open(SHARED / "data" / "gsm8k" / "train.jsonl", encoding="utf-8") as file:
        problems = [json.loads(line)["question"] for line, _ in zip(file, range(8), strict=False)]
    with open(SHARED / "data" / "text" / "cosmopedia_200.jsonl", encoding="utf-8") as file:
        texts = [json.loads(line)["text"][:600] for line, _ in zip(file, range(8), strict=False)]
    asked = [f"{page}\n\nRepeat what this says." for page in (pages * 8)[:8]]
    chats = {"extract": asked, "solve": problems}
    works = {name: [Request(str(i), (Message("user", q),), sampling) for i, q in enumerate(each)] for name, each in chats.items()}
    return works | {"continue": [Request(str(i), text, sampling) for i, text in enumerate(texts)]}


def random_work() -> list[Request]:
    sampling = Sampling(max_tokens=OUT, ignore_eos=True)
    return [Request(str(i), tuple(ids), sampling) for i, ids in enumerate(random_prompts(8, 64, "speculation"))]


def compared(engines: dict[str, Engine], requests: list[Request], batch: int, rounds: int) -> dict[str, Any]:
    rates: dict[str, list[float]] = {name: [] for name in engines}
    texts: dict[str, list[tuple[int, ...]]] = {}
    before = {name: engine.stats() for name, engine in engines.items()}
    for turn in range(rounds + 1):
        names = list(engines) if turn % 2 else list(engines)[::-1]
        for name in names:
            began, made = time.perf_counter(), []
            for start in range(0, len(requests), batch):
                made += [done.token_ids for done in engines[name].generate(requests[start : start + batch])]
            texts[name] = made
            if turn:
                rates[name].append(sum(map(len, made)) / (time.perf_counter() - began))
    out: dict[str, Any] = {"same_text": all(each == texts["off"] for each in texts.values())}
    for name, engine in engines.items():
        now = engine.stats()
        drafted, kept = now.draft_tokens - before[name].draft_tokens, now.accepted_tokens - before[name].accepted_tokens
        out[name] = {"tokens_per_second": round(median(rates[name]), 1), "kept": round(kept / drafted, 3) if drafted else None}
        out[name]["times_off"] = round(median(a / b for a, b in zip(rates[name], rates["off"], strict=True)), 3)
    return out


if __name__ == "__main__":
    sys.exit(main())
