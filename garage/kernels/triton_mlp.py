"""`mlp.py` in Triton: silu and the tanh form of gelu are both x sigmoid(z), with z = x and z = 2 sqrt(2 / pi) (x + 0.044715 x^3).

Computed in fp32 and rounded once. Every pass may write over its inputs, because the thread that reads a number is the one that writes it,
as long as all tensors have one dtype: d(gate) is written over the gradient it comes from.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _act(x, GELU: tl.constexpr):
    """act(x) and its slope."""
    z, slope = x, 1.0
    if GELU:
        z, slope = 1.5957691216057308 * (x + 0.044715 * x * x * x), 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    s = tl.sigmoid(z)
    return x * s, s + x * s * (1.0 - s) * slope


@triton.jit
def _forward(gate_ptr, up_ptr, out_ptr, numel, GELU: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    act, _ = _act(tl.load(gate_ptr + at, at < numel, 0.0).to(tl.float32), GELU)
    tl.store(out_ptr + at, act * tl.load(up_ptr + at, at < numel, 0.0).to(tl.float32), at < numel)


@triton.jit
def _backward(dact_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr, numel, GELU: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < numel
    dact = tl.load(dact_ptr + at, mask, 0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask, 0.0).to(tl.float32)
    act, slope = _act(tl.load(gate_ptr + at, mask, 0.0).to(tl.float32), GELU)
    tl.store(dgate_ptr + at, dact * up * slope, mask)
    tl.store(dup_ptr + at, dact * act, mask)


def gate(gate_TF: Tensor, up_TF: Tensor, activation: str, *, out: Tensor | None = None) -> Tensor:
    """See `mlp.gate`; `out` may be an input."""
    gate_TF, up_TF = gate_TF.contiguous(), up_TF.contiguous()
    out = torch.empty_like(gate_TF) if out is None else out
    assert out.is_contiguous() and out.dtype == gate_TF.dtype and out.shape == gate_TF.shape == up_TF.shape, (out.shape, gate_TF.shape)
    _forward[(triton.cdiv(out.numel(), BLOCK),)](gate_TF, up_TF, out, out.numel(), GELU=activation == "gelu_tanh", BLOCK=BLOCK)
    return out


def slopes(dact_TF: Tensor, gate_TF: Tensor, up_TF: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """See `mlp.slopes`."""
    dact_TF, gate_TF, up_TF = (t.contiguous() for t in (dact_TF, gate_TF, up_TF))
    dup_TF = torch.empty_like(up_TF)
    given, numel = (dact_TF, gate_TF, up_TF), dact_TF.numel()
    assert len({(t.shape, t.dtype) for t in given}) == 1, [(t.shape, t.dtype) for t in given]
    _backward[(triton.cdiv(numel, BLOCK),)](*given, dact_TF, dup_TF, numel, GELU=activation == "gelu_tanh", BLOCK=BLOCK)
    return dact_TF, dup_TF
