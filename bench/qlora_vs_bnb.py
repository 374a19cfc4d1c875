"""Adapters over a 4-bit base on CPU, beside bitsandbytes: forward and backward of the seven linears of a block, same matrices, same run.

A block of the 135M shape (576 wide, MLP 1,536), rank 16, bfloat16 activations, few and many tokens. Theirs is `Linear4bit` (NF4, double
quantisation) with the two adapter products beside it as PEFT computes them; ours is `LoRA` over `QuantLinear`. The dense block, ours
without quantising, shows what few bits cost. Sides take turns; the median of the rounds counts.

    python bench/qlora_vs_bnb.py            stores bench/results/qlora_vs_bnb.json
"""

import json
import os
import statistics
import time
from collections.abc import Callable

import torch
from record import record, typed
from torch import Tensor, nn

from garage.models.adapters import LoRA
from garage.models.layers import Linear
from garage.models.quantize import quantised

WIDTH, MLP, KV, RANK, ROUNDS = 576, 1536, 192, 16, 7
TOKENS = (8, 64, 512, 2048)
SHAPES = [(WIDTH, WIDTH), (KV, WIDTH), (KV, WIDTH), (WIDTH, WIDTH), (MLP, WIDTH), (MLP, WIDTH), (WIDTH, MLP)]


class Theirs(nn.Module):
    """`Linear4bit` and an adapter beside it."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        import bitsandbytes as bnb

        out, width = weight.shape
        self.base = bnb.nn.Linear4bit(width, out, bias=False, compute_dtype=torch.bfloat16, compress_statistics=True, quant_type="nf4")
        self.base.load_state_dict({"weight": weight})
        self.base = self.base.to("cpu")  # quantises
        self.a, self.b = nn.Linear(width, RANK, bias=False), nn.Linear(RANK, out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + (self.b(self.a(x.float())) * 2.0).to(x.dtype)


def ours(weight: Tensor, bits: str) -> nn.Module:
    base = quantised(weight, bits) if bits else Linear.holding(weight)
    lora = LoRA(base, rank=RANK, scale=2.0)
    nn.init.normal_(lora.lora_A, std=0.02)
    return lora


def seconds(linears: list[nn.Module], inputs: dict[int, Tensor]) -> float:
    """One forward and backward of every linear."""
    start = time.perf_counter()
    for linear, (_, width) in zip(linears, SHAPES, strict=True):
        linear(inputs[width]).float().sum().backward()
    return time.perf_counter() - start


def compared(sides: dict[str, list[nn.Module]], tokens: int) -> dict[str, object]:
    """Median speeds at so many tokens."""
    inputs = {width: torch.randn(tokens, width, dtype=torch.bfloat16).requires_grad_() for width in (WIDTH, MLP)}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(ROUNDS + 1):
        for name, linears in sides.items():
            times[name].append(seconds(linears, inputs))
    median = {name: statistics.median(found[1:]) for name, found in times.items()}  # the first round warms up
    return {
        "tokens": tokens,
        "tokens_per_second": {name: round(tokens / t, 1) for name, t in median.items()},
        "times_bitsandbytes": {name: round(median["bitsandbytes_nf4"] / t, 2) for name, t in median.items()},
        "nf4_share_of_dense": round(median["garage_dense"] / median["garage_nf4"], 3),
        "seconds": times,
    }


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    weights = [(torch.randn(shape) * 0.05).bfloat16() for shape in SHAPES]
    makers: dict[str, Callable[[Tensor], nn.Module]] = {
        "garage_nf4": lambda w: ours(w, "nf4"), "garage_int8": lambda w: ours(w, "int8"), "garage_dense": lambda w: ours(w, ""),
        "bitsandbytes_nf4": Theirs,
    }  # fmt: skip
    sides = {name: [make(weight) for weight in weights] for name, make in makers.items()}
    found = [compared(sides, tokens) for tokens in TOKENS]
    print(json.dumps([{key: value for key, value in each.items() if key != "seconds"} for each in found], indent=1))
    record("qlora_vs_bnb", typed(), {"threads": torch.get_num_threads(), "rounds": ROUNDS, "at": found})


if __name__ == "__main__":
    main()
