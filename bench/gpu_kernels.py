"""The Triton kernels on a GPU: each against its definition in torch, in numbers and in time.

For every kernel: how far its results are from those of the torch path, and the median time of both, through `garage.kernels.dispatch`.
Bytes are those that must be read and written once; bytes over time is a share of what copying reaches in the same run. Inputs are random,
larger than the cache, of the shapes of Gemma 3 12B at 4,096 tokens. Compiling is not timed.

    python bench/gpu_kernels.py [--small]       stores bench/results/gpu_kernels.json; --small needs 2 GB
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import torch
from record import record, typed
from torch import Tensor

from garage.kernels import adam8, columns, dispatch, logits, mlp, quant
from garage.kernels.paths import path, plainly
from garage.models.attend import PagedAttend, PageTable
from garage.models.quantize import quantised

Tensors = tuple[Tensor, ...]
DEVICE = "cuda"
FORM = {"eps": 1e-6, "offset": 1.0, "rounds_first": False}
LIMITS = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-4}


@dataclass(frozen=True)
class Case:
    """`run` on `inputs` returns results, which it may write over the inputs; `least` is the bytes it must move."""

    name: str
    inputs: Tensors
    run: Callable[[Tensors], Tensors]
    least: int


def size(*tensors: Tensor) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def draw(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def through(op: Callable[..., Tensor], grads: int, upstream: Tensor) -> Callable[[Tensors], Tensors]:
    """Forward and backward of an op; the first `grads` inputs get a gradient."""

    def run(inputs: Tensors) -> Tensors:
        leaves = [t.detach().requires_grad_(i < grads) for i, t in enumerate(inputs)]
        out = op(*leaves)
        return out.detach(), *torch.autograd.grad(out, leaves[:grads], upstream.to(out.dtype))

    return run


def norms(dtype: torch.dtype, tokens: int, width: int) -> list[Case]:
    x, weight, form = draw(tokens, width, dtype=dtype), draw(width, dtype=dtype), FORM
    heads, head_weight, angle = draw(tokens, 16, 256, dtype=dtype), draw(256, dtype=dtype), draw(tokens, 128, dtype=torch.float32)
    angles = (angle.cos().to(dtype), angle.sin().to(dtype))
    turned = through(lambda x, w, c, s: dispatch.norm_rotate(x, w, (c, s), **form), 2, heads)
    return [
        Case("norm", (x, weight), lambda t: (dispatch.rms_norm(*t, **form),), 2 * size(x)),
        Case("add and norm", (x, x.flip(0), weight), lambda t: dispatch.add_norm(*t, **form), 4 * size(x)),
        Case("norm, both ways", (x, weight), through(lambda x, w: dispatch.rms_norm(x, w, **form), 2, x.flip(0)), 5 * size(x)),
        Case("norm and turn", (heads, head_weight, *angles), lambda t: (dispatch.norm_rotate(*t[:2], t[2:], **form),), 2 * size(heads)),
        Case("norm and turn, both ways", (heads, head_weight, *angles), turned, 5 * size(heads)),
    ]


def gates(dtype: torch.dtype, tokens: int, width: int) -> list[Case]:
    gate, up, dact = (draw(tokens, width, dtype=dtype) for _ in range(3))
    return [
        Case(f"gate, {name}", (gate, up), lambda t, name=name: (dispatch.gated(*t, activation=name),), 3 * size(gate))
        for name in ("silu", "gelu_tanh")
    ] + [Case("gate backward", (dact, gate, up), lambda t: path(mlp, gate).slopes(*t, "gelu_tanh"), 5 * size(gate))]


def rest(dtype: torch.dtype, rows: int, vocabulary: int, width: int) -> list[Case]:
    z, targets = draw(rows, vocabulary, dtype=dtype) * 3, torch.randint(0, vocabulary, (rows,), device=DEVICE)
    y, gain = draw(8 * rows, width, dtype=dtype), draw(width, dtype=torch.float32).sign()  # however often y is multiplied, it stays
    weight = draw(width, 4 * width, dtype=dtype) * 0.05
    packed, (codes, scale) = quant.nf4(weight), quant.int8(weight)
    shape = (width, 4 * width)
    return [
        Case("cross-entropy in place", (z, targets), lambda t: (path(logits, z).cross_entropy_(*t, scale=1.0).loss_R, t[0]), 2 * size(z)),
        Case("columns scaled", (y, gain), lambda t: (path(columns, y).scale_(*t),), 2 * size(y)),
        Case("columns summed and scaled", (y, y.flip(0), gain), lambda t: (path(columns, y).scale_and_sum_(*t), t[0]), 3 * size(y)),
        Case("nf4", (weight,), lambda t: (quant.nf4_dense(dispatch.nf4(*t), shape, dtype),), size(weight, *packed)),
        Case("nf4 widened", packed, lambda t: (dispatch.nf4_dense(quant.Nf4(*t), shape, dtype),), size(weight, *packed)),
        Case("int8 widened", (codes, scale), lambda t: (dispatch.int8_dense(*t, dtype),), size(weight, codes)),
    ]


def serving(dtype: torch.dtype, requests: int) -> list[Case]:
    """Decoding at 1,024 tokens of context over shuffled pages, a prompt of 2,048, and one row times matrices in few bits."""
    found, (heads, kv, width, page) = [], (16, 8, 128, 16)
    cases = (("decode", 1, 1024, dtype), ("decode, e4m3", 1, 1024, torch.float8_e4m3fn), ("prompt", 2048, 2048, dtype))
    for name, rows, context, pool in cases:
        count = requests if rows == 1 else 1
        keys, values = (draw(count * context // page, page, kv, width, dtype=torch.float32).to(pool) for _ in range(2))
        tables = torch.randperm(len(keys), device=DEVICE).view(count, -1)
        last = torch.arange(context - rows, context, device=DEVICE)
        slots = (tables[:, last // page] * page + last % page).flatten()
        k = draw(len(slots), kv, width, dtype=dtype)
        attend = partial(PagedAttend, tables=[PageTable(slots, tables)], rows=(rows,) * count, contexts=(context,) * count)

        def run(t: Tensors, attend: Callable[..., PagedAttend] = attend) -> Tensors:
            return (attend(keys=[t[3]], values=[t[4]])(*t[:3], layer=0, scale=width**-0.5, window=None),)

        inputs = (draw(len(slots), heads, width, dtype=dtype), k, k.flip(0), keys, values)
        found.append(Case(f"pages, {name}", inputs, run, size(keys, values)))
    for bits in ("int8", "nf4"):
        linear, x = quantised(draw(12_288, 4096, dtype=dtype) * 0.05, bits), draw(1, 4096, dtype=dtype)
        found.append(Case(f"{bits}, one row", (x,), lambda t, linear=linear: (linear(*t),), size(*linear.weight.buffers())))
    return found


def optimizer(width: int) -> list[Case]:
    weight, grad = draw(width, 4 * width, dtype=torch.float32), draw(width, 4 * width, dtype=torch.float32)
    step = adam8.Step(1e-2, 0.1, 0.9, 0.999, 1e-8, 2.0)
    means = adam8.update(weight, grad.flip(0), adam8.Means.zero(weight), step)

    def run(t: Tensors) -> Tensors:
        found = path(adam8, weight).update(t[0], t[1], adam8.Means(*t[2:]), step)
        return t[0], quant.bytes_dense(found.mean, found.mean_max)

    return [Case("adam8", (weight, grad, *means), run, 2 * size(weight, *means) + size(grad))]


def milliseconds(call: Callable[[], object]) -> float:
    from triton.testing import do_bench

    return float(do_bench(call, warmup=50, rep=300, return_mode="median"))


def copies(inputs: Tensors) -> Tensors:
    return tuple(t.clone() for t in inputs)


def errors(case: Case) -> list[float]:
    """Of each result of the kernel against the torch path, as a share of its norm. Memory that is not written is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    found = case.run(copies(case.inputs))
    with plainly():
        expected = case.run(copies(case.inputs))
    torch.use_deterministic_algorithms(False)
    return [float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)) for a, b in zip(found, expected, strict=True)]


def measured(case: Case, dtype: torch.dtype, copy_rate: float) -> dict[str, object]:
    """A case in figures; the inputs of both sides are the same memory, so what is written over them drifts, which costs no time."""
    off = errors(case)
    ours = milliseconds(lambda: case.run(case.inputs))
    with plainly():
        plain = milliseconds(lambda: case.run(case.inputs))
    rate = case.least / ours * 1e-6
    return {
        "case": case.name, "dtype": str(dtype).removeprefix("torch."), "errors": [float(f"{e:.2e}") for e in off],
        "is_right": all(e <= LIMITS[dtype] for e in off), "ms": round(ours, 4), "torch_ms": round(plain, 4),
        "times_torch": round(plain / ours, 2), "gb_per_s": round(rate, 1), "share_of_copy": round(rate / copy_rate, 3),
    }  # fmt: skip


def copying(numbers: int) -> float:
    """GB/s read and written by a copy."""
    source = draw(numbers, dtype=torch.float32)
    target = torch.empty_like(source)
    return 2 * source.nbytes / milliseconds(lambda: target.copy_(source)) * 1e-6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="an eighth of the rows, for small cards")
    small = parser.parse_args().small
    missing = "GPU" if not torch.cuda.is_available() else "triton" if find_spec("triton") is None else None
    if missing:
        sys.exit(f"This bench measures kernels on a GPU: it needs a CUDA device and triton, and there is no {missing} here.")
    torch.manual_seed(0)
    tokens, rows, width = (512, 64, 1024) if small else (4096, 512, 3840)
    copy_rate, found = copying((32 if small else 256) << 20), []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        makers = [partial(norms, dtype, tokens, 3840), partial(gates, dtype, tokens, 15360), partial(rest, dtype, rows, 262_208, width),
                  partial(serving, dtype, 16 if small else 64)]  # fmt: skip
        for make in makers + ([lambda: optimizer(width)] if dtype == torch.float32 else []):
            found += [measured(case, dtype, copy_rate) for case in make()]
            torch.cuda.empty_cache()
    for row in found:
        print(json.dumps(row))
    record("gpu_kernels", typed(), {"copy_gb_per_s": round(copy_rate, 1), "is_small": small, "cases": found})
    if not all(row["is_right"] for row in found):
        sys.exit("some kernels are wrong: " + ", ".join(f"{row['case']} ({row['dtype']})" for row in found if not row["is_right"]))


if __name__ == "__main__":
    main()
