"""The memory of a training step: counted for published sizes, beside transformers + PEFT, and measured on this machine.

    counted     `garage plan`'s figures for a GPU: our step on tensors without numbers, every storage counted. No GPU is needed.
    theirs      the same step through transformers + PEFT (DoRA, NF4 weights counted at 4.127 bits, 8-bit Adam counted by formula) under the
                same counter: with the library's loss, and without any loss at all, the least a fused one could take
    measured    whole processes on this CPU: the largest resident set of a real run, against what `garage plan` says before it; once as
                it comes, once with freed blocks given back at once (glibc keeps them otherwise)

    python bench/train_memory.py                       stores bench/results/train_memory.json
    python bench/train_memory.py --case lora           one measured case, in this process; prints its figures
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import record, typed

from garage.core.events import EventLog
from garage.kernels.packed import varlen_attention
from garage.models.families import build, config_json, from_architecture, init_weights, named
from garage.models.layers import Linear
from garage.models.quantize import quantised
from garage.recipes.plan import plan
from garage.recipes.tune import adapted
from garage.specs.plan import PlanSpec
from garage.specs.train import LINEARS
from garage.store.dataset import Encoded
from garage.train.budget import step_budget
from garage.train.bytes import ByteCounter
from garage.train.loop import fit, prepare

ROOT = Path(__file__).parents[1]
QLORA = {"quantize": "nf4", "dora": True, "rslora": True, "rank": 64, "alpha": 64}
LOW = {"embedding": "int8", "dtype": "bfloat16"}
SHAPE = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64}
MEASURED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "lora": ({"kind": "lora", "rank": 16}, {}),
    "lora, every layer computed again": ({"kind": "lora", "rank": 16}, {"checkpointing": "all"}),
    "nf4, DoRA": ({"kind": "lora", "rank": 16, "quantize": "nf4", "dora": True}, {}),
    "full": ({"kind": "full"}, {}),
    "full, adamw8": ({"kind": "full"}, {"optimizer": {"kind": "adamw8"}}),
}


def counted(model: str, tokens: int, *, adapter: dict[str, Any] | None = None, low: bool = False, **settings: Any) -> dict[str, Any]:
    """Gigabytes of tensors of one step on a GPU, by item."""
    lora = QLORA | (LOW if low else {}) | (adapter or {})
    step = {"max_steps": 1, "batch_tokens": tokens, "micro_tokens": tokens, "max_length": tokens, "checkpointing": "all"}
    step |= {"optimizer": {"kind": "adamw8"}} | ({"tile": 1024, "offload": True} if low else {}) | settings
    found = plan(PlanSpec.parse({"model": model, "adapter": lora, "fit": step, "device": "cuda", "budget": "1TB"}))
    sizes = {item.name: round(item.bytes / 1e9, 3) for item in found.items if item.name != "process"}
    total = round(sum(sizes.values()), 2)
    return {"model": model, "tokens": tokens, "low_memory": low, "rank": lora["rank"], "total_gb": total, "items": sizes}


def theirs(name: str, tokens: int, *, has_loss: bool) -> dict[str, Any]:
    """The same step through transformers + PEFT; NF4 weights are dense there for the counter, and counted at what they would take."""
    import transformers
    from peft import LoraConfig, get_peft_model
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register("flash_stand_in", flash)
    raw = config_json(named(name))
    config = transformers.AutoConfig.for_model(raw.pop("model_type"), **raw)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        lora = LoraConfig(r=64, lora_alpha=64, use_rslora=True, use_dora=True, target_modules=list(LINEARS), task_type="CAUSAL_LM")
        model.config._attn_implementation = "flash_stand_in"
        model = get_peft_model(model, lora, autocast_adapter_dtype=True)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    model.train()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    frozen = {weight for weight in model.parameters() if not weight.requires_grad}
    linear = sum(weight.numel() for part, weight in model.named_parameters() if weight in frozen and "base_layer" in part)
    wide = sum(weight.numel() for weight in frozen) - linear
    ids = torch.zeros(1, tokens, dtype=torch.int64, device="meta")
    given = {"input_ids": ids, "position_ids": torch.arange(tokens, device="meta")[None], "use_cache": False}
    given["attention_mask"] = {"full_attention": None, "sliding_attention": None}
    with ByteCounter([*model.parameters(), *model.buffers()]) as counter:
        if has_loss:
            model(labels=ids, **given).loss.backward()
        else:
            model.get_base_model().model(**given).last_hidden_state.sum().backward()
    resident = linear * 4.127 / 8 + 2 * wide + sum(4 * weight.numel() + 2.03 * weight.numel() for weight in trained)
    return {"has_loss": has_loss, "peak_gb": round(counter.peak / 1e9, 2), "total_gb": round((counter.peak + resident) / 1e9, 2)}


def flash(module: object, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: object, **_: object) -> tuple[torch.Tensor, None]:
    """Attention with the memory of FlashAttention, which is theirs on a GPU too."""
    rows = [part.transpose(1, 2)[0] for part in (q, k, v)]
    bounds = torch.zeros(2, dtype=torch.int32, device="meta")
    return varlen_attention(*rows, bounds, len(rows[0]), scale=1.0, window=None)[None], None


def measured(case: str) -> dict[str, float]:
    """One real run of a 135M model in this process: what was counted before it, and the most this process ever held."""
    adapter, changes = MEASURED[case]
    torch.set_num_threads(1)
    rows = 8
    settings = {"max_steps": 2, "batch_tokens": 2048, "micro_tokens": 2048, "max_length": 512, "checkpointing": "off", "threads": 1}
    spec = PlanSpec.parse({"model": "135m", "adapter": adapter, "fit": settings | changes | {"eval_every": 0, "save_every": 9999}})
    config = from_architecture(
        "qwen3", vocab_size=49_152, rope_theta=1e4, sliding_window=None, num_hidden_layers=30, max_position_embeddings=2048, **SHAPE
    )
    is_full = adapter["kind"] == "full"
    model = build(config, dtype=torch.float32 if is_full else torch.bfloat16)
    init_weights(model, 0)
    if not is_full:
        for name, module in list(model.model.layers.named_modules()) if adapter.get("quantize") else ():
            if isinstance(module, Linear):
                model.model.layers.set_submodule(name, quantised(module.weight, "nf4"))
        adapted(model, spec.adapter, seed=0)  # type: ignore[arg-type]
    prepare(model, spec.fit)
    layers = 30 if spec.fit.checkpointing == "all" else 0
    said = step_budget(model, spec.fit, device="cpu", layers=layers)
    libraries = said.items["process"] - said.items["weights"] - said.items["trained weights"]  # the weights are in it already
    draw = np.random.default_rng(0)
    data = Encoded(draw.integers(0, 49_000, rows * 513).astype("<u4"), np.ones(rows * 513, "u1"), np.arange(rows + 1) * 513)
    with tempfile.TemporaryDirectory() as place:
        fit(model, train=data, held=None, spec=spec.fit, run=Path(place), events=EventLog(None))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    total = said.tensors + libraries
    return {"planned_gb": round(total / 1e9, 3), "measured_gb": round(peak / 1e9, 3), "measured_over_planned": round(peak / total, 3)}


def in_process(case: str, *, gives_back: bool) -> dict[str, Any]:
    """A case in a process of its own, as it comes or with every larger block given back to the system at once."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment |= {"MALLOC_MMAP_THRESHOLD_": "262144"} if gives_back else {}
    done = subprocess.run([sys.executable, __file__, "--case", case], capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(f"{case} failed:\n{done.stderr[-2000:]}")
    return {"case": case, "gives_back": gives_back, **json.loads(done.stdout.splitlines()[-1])}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=MEASURED)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measured(options.case)))
        return 0
    real = [in_process(case, gives_back=gives_back) for case in MEASURED for gives_back in (False, True)]
    print(json.dumps(real, indent=1), flush=True)
    sizes = ("gemma3-1b", "gemma3-4b", "gemma3-12b", "qwen3-0.6b", "qwen3-8b")
    table = [counted(model, 4096, low=low) for model in sizes for low in (False, True)]
    lengths = [counted("gemma3-12b", tokens, low=low) for tokens in (1024, 2048, 8192, 16384) for low in (False, True)]
    ranks = [counted("gemma3-12b", 4096, adapter={"rank": rank, "alpha": rank}) for rank in (8, 16, 32, 128)]
    others = {name: theirs("gemma3-12b", 4096, has_loss=has_loss) for name, has_loss in (("library loss", True), ("no loss", False))}
    figures = {"measured": real, "sizes": table, "lengths": lengths, "ranks": ranks, "transformers_peft_12b": others}
    print(json.dumps(others), record("train_memory", typed(), figures))
    promise = next(each["total_gb"] for each in table if each["model"] == "gemma3-12b" and not each["low_memory"])
    return 0 if promise <= 11.8 and all(each["measured_over_planned"] <= 1.15 for each in real) else 1


if __name__ == "__main__":
    sys.exit(main())
