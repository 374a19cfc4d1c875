"""The reference pretraining: 7,029,824 parameters on 50,000 tokens, to loss 4.49 and accuracy 31.85 %, in minutes on two cores.

The reference claims these figures after 20.3 minutes. Its protocol: all 49,744 overlapping windows of 256 tokens (stride 1), a random
10 % held out (seed 42), 160 of them evaluated. That split is leaky, since every held-out token also stands in training windows: it
measures memory. We repeat it like for like, because it is the published figure, and label it so.

Beside it stands what the same model learns honestly: trained on documents 1 to 81, measured on every token of documents 82 to 91.
Baselines on the same tokens, smoothed on the training part: unigram 7.89 nats and 4.2 %, interpolated bigram 7.21 nats and 13.1 %.
Its settings were chosen on documents 74 to 81.

What makes it fast: the windows of one pass do not overlap (an update on the same tokens again teaches little), Muon on the hidden
matrices, bfloat16 products, and a head of 49,152 rows that never holds its logits in float32. Both runs are the product's own `fit`.

    python bench/pretrain_reference.py             both splits; stores bench/results/pretrain_reference.json
    python bench/pretrain_reference.py --smoke     a few steps of each; stores nothing
"""

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import record, typed
from tokenizers import Tokenizer

from garage.core.events import EventLog
from garage.models.families import build, from_architecture, init_weights
from garage.models.layers import Model
from garage.specs.train import FitSpec
from garage.store.dataset import Encoded
from garage.train.loop import Fitted, fit

SHARED = Path(os.environ.get("GARAGE_SHARED", Path(__file__).parents[2] / "shared"))
PARAMETERS, WINDOW, EVALUATED, SEED = 7_029_824, 256, 160, 42
GOAL = {"loss": 4.49, "accuracy": 0.3185, "seconds": 120.0}
BASELINES = {"unigram": {"loss": 7.89, "accuracy": 0.042}, "interpolated bigram": {"loss": 7.21, "accuracy": 0.131}}


@dataclass(frozen=True)
class Recipe:
    """How one of the two runs is trained."""

    passes: int
    hidden_lr: float
    rest_lr: float
    decay: float


LEAKY = Recipe(passes=4, hidden_lr=0.02, rest_lr=0.02, decay=0.0)
HONEST = Recipe(passes=3, hidden_lr=0.02, rest_lr=0.01, decay=0.1)


def make_model() -> Model:
    """The reference's shape as a Qwen 3."""
    shape = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3, "head_dim": 32}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": WINDOW}
    model = build(from_architecture("qwen3", vocab_size=49_152, rope_theta=10_000.0, sliding_window=None, **shape))
    assert sum(weight.numel() for weight in model.parameters()) == PARAMETERS
    init_weights(model, SEED)
    return model


def encoded(rows: list[np.ndarray]) -> Encoded:
    """Rows of which every token is learned. A row of 257 tokens is a window of 256 inputs and their 256 targets."""
    tokens = np.concatenate(rows).astype("<u4")
    return Encoded(tokens, np.ones(len(tokens), "u1"), np.cumsum([0, *map(len, rows)]))


def leaky_split(passes: int) -> tuple[Encoded, Encoded]:
    """The reference's windows. Of the training windows, each pass takes those nearest to a grid with a random start."""
    tokens = np.fromfile(SHARED / "data" / "text" / "seed_tokens_50k.u16", "<u2")
    draw = np.random.default_rng(SEED)
    starts = draw.permutation(len(tokens) - WINDOW)
    held, training = starts[: len(starts) // 10], np.sort(starts[len(starts) // 10 :])
    grid = np.concatenate([np.arange(draw.integers(WINDOW), training[-1], WINDOW) for _ in range(passes)])
    chosen = training[np.searchsorted(training, grid)]
    assert not set(held.tolist()) & set(chosen.tolist())
    windows = [[tokens[start : start + WINDOW + 1] for start in these] for these in (chosen, held[:EVALUATED])]
    return encoded(windows[0]), encoded(windows[1])


def honest_split(passes: int) -> tuple[Encoded, Encoded]:
    """Documents 1 to 81 as one stream, its windows starting elsewhere in each pass; 82 to 91 cut so that each token counts once."""
    tokenizer = Tokenizer.from_file(str(SHARED / "data" / "tokenizers" / "smollm" / "tokenizer.json"))
    with open(SHARED / "data" / "text" / "cosmopedia_200.jsonl", encoding="utf-8") as file:
        texts = [json.loads(line)["text"][:3000] for line, _ in zip(file, range(91), strict=False)]
    documents = [np.array(tokenizer.encode(text).ids) for text in texts]
    stream, draw = np.concatenate(documents[:81]), np.random.default_rng(SEED)
    grid = np.concatenate([np.arange(draw.integers(WINDOW), len(stream) - WINDOW, WINDOW) for _ in range(passes)])
    training = [stream[at : at + WINDOW + 1] for at in grid]
    held = [document[at : at + WINDOW + 1] for document in documents[81:] for at in range(0, len(document) - 1, WINDOW)]
    return encoded(training), encoded(held)


def train(recipe: Recipe, splits: tuple[Encoded, Encoded], max_steps: int | None) -> dict[str, Any]:
    """One run, evaluated once, at its end: no figure is the best of several."""
    optimizer = {"kind": "muon", "lr": recipe.hidden_lr, "adamw": {"lr": recipe.rest_lr, "beta2": 0.95, "weight_decay": recipe.decay}}
    values = {"batch_tokens": 1024, "micro_tokens": 1024, "max_length": WINDOW + 1, "eval_every": 0, "save_every": 1_000_000, "seed": SEED}
    values |= {"max_steps": max_steps, "epochs": None if max_steps else 1}
    values |= {"optimizer": optimizer, "schedule": {"kind": "linear", "warmup": 0.05}}
    records: list[dict[str, float]] = []
    events = EventLog(None, lambda event: records.append(dict(event)) if event["kind"] == "metric" else None)  # type: ignore[arg-type]
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as place:
        fitted = fit(make_model(), train=splits[0], held=splits[1], spec=FitSpec.parse(values), run=Path(place), events=events)
    return figures(fitted, records, time.perf_counter() - began) | {"recipe": vars(recipe)}


def figures(fitted: Fitted, records: list[dict[str, float]], seconds: float) -> dict[str, Any]:
    """What a run came to; `seconds` is everything from building the model to the last evaluation."""
    final = next(record for record in reversed(records) if "held_loss" in record)
    curve = {int(record["step"]): round(record["loss"], 4) for record in records if "loss" in record}
    counts = {"steps": fitted.steps, "tokens": fitted.tokens, "tokens_per_second": round(fitted.tokens_per_second, 1)}
    measured = {"loss": final["held_loss"], "accuracy": final["held_accuracy"], "perplexity": float(np.exp(final["held_loss"]))}
    return {"seconds": round(seconds, 2), **measured, **counts, "peak_bytes": fitted.peak_bytes, "train_loss": curve}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="three steps of each run, nothing stored")
    options = parser.parse_args()
    steps = 3 if options.smoke else None
    runs = {"leaky": train(LEAKY, leaky_split(LEAKY.passes), steps), "by_document": train(HONEST, honest_split(HONEST.passes), steps)}
    verdict = judge(runs)
    for name, run in runs.items():
        print(name, {key: value for key, value in run.items() if key != "train_loss"})
    if not options.smoke:
        facts = {"goal": GOAL, "baselines_by_document": BASELINES, "threads": torch.get_num_threads()}
        record("pretrain_reference", typed(), {**runs, **verdict, **facts})
    return 0 if options.smoke or all(verdict.values()) else 1


def judge(runs: dict[str, dict[str, Any]]) -> dict[str, bool]:
    """Is the published figure reached in time, and is the honest one better than counting pairs?"""
    leaky, honest, bigram = runs["leaky"], runs["by_document"], BASELINES["interpolated bigram"]
    is_good = leaky["loss"] <= GOAL["loss"] and leaky["accuracy"] >= GOAL["accuracy"]
    return {"goal_reached": is_good, "in_time": leaky["seconds"] <= GOAL["seconds"], "bigram_beaten": honest["loss"] < bigram["loss"]}


if __name__ == "__main__":
    sys.exit(main())
