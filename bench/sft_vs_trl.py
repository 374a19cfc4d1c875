"""Fine-tuning on CPU, side by side with transformers + TRL + PEFT: tokens per second and peak memory, as ratios.

The same rows (GSM8K as chat, tokenised once), the same base (a Qwen 3 of 135M or the Gemma 3 of 270M, random weights, read from the same
file), the same adapter (r 16 on all seven linears) or every weight, the same rows per update, products in bfloat16 on both sides (trained
whole models are float32 on both), the answer's tokens learned; only the order of the rows and the draw of the adapter differ. Each side
runs in a process of its own, one after the other. TRL gets its fastest settings without packing (which on CPU would mix documents): no
gradient checkpointing, with and without grouping by length; the better of its variants counts.

Tokens are those of the rows; padding is not counted on either side. The first steps are left out of the time on both. Peak memory is the
process's largest resident set, imports included, as a person's machine sees it.

    python bench/sft_vs_trl.py                                     stores bench/results/sft_vs_trl.json
    python bench/sft_vs_trl.py --model gemma3-270m --kind full     stores bench/results/sft_vs_trl_gemma3-270m_full.json
    python bench/sft_vs_trl.py --steps 4 --layers 2                a smoke run; stores nothing
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import record, typed
from tokenizers import Tokenizer

from garage.core.events import EventLog
from garage.models.adapters import adapt
from garage.models.families import build, from_architecture, init_weights, named
from garage.models.gemma3 import Gemma3Config
from garage.models.weights import load_model, save_model
from garage.specs.train import LINEARS, FitSpec
from garage.store.dataset import Encoded
from garage.train.loop import fit

SHARED = Path(os.environ.get("GARAGE_SHARED", Path(__file__).parents[2] / "shared"))
SHAPE = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64}
VOCAB, THETA, CONTEXT, ROWS, RANK, ALPHA, LR, SKIP = 49_152, 10_000.0, 2048, 8, 16, 32, 2e-4, 3
GEMMA = "gemma3-270m"
SIDES = ("garage", "trl", "trl_grouped")


def make_rows(count: int) -> list[dict[str, list[int]]]:
    """Rows as ids and learned flags; the answer and its end token are learned."""
    tokenizer = Tokenizer.from_file(str(SHARED / "data" / "tokenizers" / "smollm" / "tokenizer.json"))
    rows = []
    with open(SHARED / "data" / "gsm8k" / "train.jsonl", encoding="utf-8") as file:
        for line, _ in zip(file, range(count), strict=False):
            raw = json.loads(line)
            prompt = tokenizer.encode(f"<|im_start|>user\n{raw['question']}<|im_end|>\n<|im_start|>assistant\n").ids
            answer = tokenizer.encode(f"{raw['answer']}<|im_end|>").ids
            rows.append({"input_ids": prompt + answer, "completion_mask": [0] * len(prompt) + [1] * len(answer)})
    return rows


def write_base(place: Path, name: str, layers: int | None) -> None:
    """The random base both sides read."""
    config = named(name) if name == GEMMA else from_architecture(
        "qwen3", vocab_size=VOCAB, rope_theta=THETA, sliding_window=None, num_hidden_layers=30, max_position_embeddings=CONTEXT, **SHAPE
    )  # fmt: skip
    if layers:
        kinds = {"layer_types": config.layer_types[:layers]} if isinstance(config, Gemma3Config) else {}
        config = replace(config, num_hidden_layers=layers, **kinds)
    model = build(config, dtype=torch.bfloat16)
    init_weights(model, 0)
    place.mkdir()
    save_model(model, place)


def garage(rows: list[dict[str, list[int]]], base: Path, place: Path, kind: str) -> dict[str, float]:
    """Our loop; micro_tokens is our memory setting, the rows per update are the same as theirs."""
    bounds = np.cumsum([0, *(len(row["input_ids"]) for row in rows)])
    tokens, learned = (np.concatenate([row[name] for row in rows]) for name in ("input_ids", "completion_mask"))
    data = Encoded(tokens.astype("<u4"), learned.astype("u1"), bounds)
    model = load_model(base, dtype=torch.float32 if kind == "full" else torch.bfloat16)
    if kind == "lora":
        adapt(model, rank=RANK, alpha=ALPHA, targets=LINEARS, seed=0)
    records: list[dict[str, float]] = []
    events = EventLog(None, lambda event: records.append(dict(event)) if event["kind"] == "metric" else None)  # type: ignore[arg-type]
    batch = -(-ROWS * int(bounds[-1] - len(rows)) // len(rows))  # the last token of a row is no input
    settings = {"epochs": 1, "batch_tokens": batch, "micro_tokens": 512, "max_length": 512, "save_every": 1_000_000, "eval_every": 0}
    spec = FitSpec.parse(settings | {"optimizer": {"kind": "adamw", "lr": LR}, "schedule": {"kind": "constant", "warmup": 0.0}})
    fitted = fit(model, train=data, held=None, spec=spec, run=place, events=events)
    seconds = sum(each["tokens"] / each["tokens_per_second"] for each in per_step(records)[SKIP:])
    inputs = records[-1]["tokens"] - records[SKIP - 1]["tokens"]
    per_row = bounds[-1] / fitted.ledger.input_tokens  # rows are counted whole, though their last token is never an input
    losses = {"first_loss": records[0]["loss"], "last_loss": records[-1]["loss"]}
    return {"tokens_per_second": float(inputs * per_row / seconds), **losses, "steps": fitted.steps}


def per_step(records: list[dict[str, float]]) -> list[dict[str, float]]:
    """The records with the tokens of each step alone instead of the sum."""
    before = [0.0, *(record["tokens"] for record in records)]
    return [{**record, "tokens": record["tokens"] - earlier} for record, earlier in zip(records, before, strict=False)]


def trl(rows: list[dict[str, list[int]]], base: Path, place: Path, kind: str, *, is_grouped: bool) -> dict[str, float]:
    """Their loop."""
    import datasets
    import peft
    import transformers
    from trl import SFTConfig, SFTTrainer

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32 if kind == "full" else torch.bfloat16)
    backend = Tokenizer.from_file(str(SHARED / "data" / "tokenizers" / "smollm" / "tokenizer.json"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    times: list[float] = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *args: object, **kwargs: object) -> None:
            times.append(time.perf_counter())

    settings: dict[str, Any] = {"output_dir": str(place), "per_device_train_batch_size": ROWS, "num_train_epochs": 1, "learning_rate": LR}
    settings |= {"lr_scheduler_type": "constant", "bf16": True, "use_cpu": True, "gradient_checkpointing": False, "packing": False}
    settings |= {"completion_only_loss": True, "max_length": 512, "logging_steps": 1, "report_to": [], "save_strategy": "no", "seed": 0}
    settings |= {"disable_tqdm": True, "train_sampling_strategy": "group_by_length" if is_grouped else "random"}
    lora = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=list(LINEARS), task_type="CAUSAL_LM")
    trainer = SFTTrainer(
        model=model, args=SFTConfig(**settings), train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer,
        peft_config=lora if kind == "lora" else None, callbacks=[Clock()],
    )  # fmt: skip
    order = seen_order(trainer)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    real = sum(order[SKIP * ROWS :])
    rate = real / (times[-1] - times[SKIP - 1])
    return {"tokens_per_second": rate, "first_loss": losses[0], "last_loss": losses[-1], "steps": len(times)}


def seen_order(trainer: object) -> list[int]:
    """The lengths of the rows in the order they are collated, noted while they are."""
    lengths: list[int] = []
    real = trainer.data_collator  # type: ignore[attr-defined]

    def collate(batch: list[dict[str, list[int]]]) -> object:
        lengths.extend(len(row["input_ids"]) for row in batch)
        return real(batch)

    trainer.data_collator = collate  # type: ignore[attr-defined]
    return lengths


def side(name: str, given: Path, kind: str) -> None:
    """One side in this process; prints its figures."""
    rows = json.loads((given / "rows.json").read_text())
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    with tempfile.TemporaryDirectory() as place:
        run = garage if name == "garage" else trl
        figures = run(rows, given / "base", Path(place), kind, **({} if name == "garage" else {"is_grouped": name == "trl_grouped"}))  # type: ignore[arg-type]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({**figures, "peak_bytes": peak}))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--model", choices=("qwen3-135m", GEMMA), default="qwen3-135m")
    parser.add_argument("--kind", choices=("lora", "full"), default="lora")
    parser.add_argument("--layers", type=int, help="fewer layers, for a smoke run")
    parser.add_argument("--repeats", type=int, default=2, help="how often each side runs; the best of each counts")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--side", choices=SIDES)
    parser.add_argument("--given", type=Path)
    options = parser.parse_args()
    if options.side:
        side(options.side, options.given, options.kind)
        return 0
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in SIDES}
    with tempfile.TemporaryDirectory() as place:
        given = Path(place)
        write_base(given / "base", options.model, options.layers)
        (given / "rows.json").write_text(json.dumps(make_rows(ROWS * options.steps)))
        for name in SIDES * options.repeats:
            runs[name].append(in_process(name, given, options.threads, options.kind))
            print(name, runs[name][-1], flush=True)
    figures = compare(runs)
    print(json.dumps(figures))
    if options.layers is None:
        is_first = options.model == "qwen3-135m" and options.kind == "lora"
        name = "sft_vs_trl" if is_first else f"sft_vs_trl_{options.model}_{options.kind}"
        record(name, typed(), {"steps": options.steps, "threads": options.threads, **figures, "runs": runs})
    return 0 if figures["speed_ratio"] >= 1.5 and figures["memory_ratio"] <= 0.5 else 1


def in_process(name: str, given: Path, threads: int, kind: str) -> dict[str, float]:
    """Run one side in a fresh process."""
    program = [sys.executable, __file__, "--side", name, "--given", str(given), "--kind", kind]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[1])
    done = subprocess.run(program, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def compare(runs: dict[str, list[dict[str, float]]]) -> dict[str, float]:
    """Our best run against the best run of their fastest variant; memory against the least any of theirs needed."""
    best = {name: max(each["tokens_per_second"] for each in these) for name, these in runs.items()}
    peak = {name: min(each["peak_bytes"] for each in these) for name, these in runs.items()}
    theirs = [name for name in SIDES if name != "garage"]
    speed, memory = best["garage"] / max(best[name] for name in theirs), peak["garage"] / min(peak[name] for name in theirs)
    return {"speed_ratio": round(speed, 3), "memory_ratio": round(memory, 3)}


if __name__ == "__main__":
    sys.exit(main())
