"""The one place where the path of an op is chosen; models import ops from here and from nowhere else.

With gradients on, an op is its hand-written autograd Function; without, the same arithmetic bare, because building a Function
costs more than a small decode step's work. Attention takes torch's variable-length FlashAttention on CUDA in 16-bit floats, and
the per-document path elsewhere. A tensor on `meta` takes the path of the device it stands for, so that a step's memory can be counted
on any machine.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from garage.kernels import linear as _linear
from garage.kernels import mlp, norm, packed, rope

_meta_is: ContextVar[str] = ContextVar("meta_is", default="cuda")


@contextmanager
def meta_stands_for(device: str) -> Iterator[None]:
    """Inside, tensors on `meta` take the paths of "cuda" or "cpu"."""
    token = _meta_is.set(device)
    try:
        yield
    finally:
        _meta_is.reset(token)


def rms_norm(x: Tensor, weight: Tensor, *, eps: float, offset: float, rounds_first: bool) -> Tensor:
    """See `reference.rms_norm`."""
    if _needs_grad(x, weight):
        return norm.RMSNorm.apply(x, weight, eps, offset, rounds_first)  # type: ignore[no-any-return, no-untyped-call]
    return norm.normalize(x, weight, eps, offset, rounds_first)[0]


def rotate(x_TNH: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> Tensor:
    """See `reference.rotate`."""
    if _needs_grad(x_TNH):
        return rope.Rotate.apply(x_TNH, cos_TH, sin_TH)  # type: ignore[no-any-return, no-untyped-call]
    return rope.turn(x_TNH, cos_TH, sin_TH)


def gated(gate_TF: Tensor, up_TF: Tensor, *, activation: str) -> Tensor:
    """See `reference.gated`."""
    if _needs_grad(gate_TF, up_TF):
        return mlp.Gated.apply(gate_TF, up_TF, activation)  # type: ignore[no-any-return, no-untyped-call]
    return mlp.gate(gate_TF, up_TF, activation)


def linear(x_TI: Tensor, weight_OI: _linear.Weight) -> Tensor:
    """x W^T in the dtype of x, whatever the dtype of W."""
    if isinstance(weight_OI, Tensor) and x_TI.dtype == weight_OI.dtype:
        return F.linear(x_TI, weight_OI)
    if torch.is_grad_enabled() and (x_TI.requires_grad or weight_OI.requires_grad):
        return _linear.CastLinear.apply(x_TI, weight_OI)  # type: ignore[no-any-return, no-untyped-call]
    return F.linear(x_TI, _linear.dense(weight_OI, x_TI.dtype))


def dense(weight_OI: _linear.Weight, dtype: torch.dtype) -> Tensor:
    """Any weight as a matrix in `dtype`."""
    return _linear.dense(weight_OI, dtype)


def low_rank(x_TI: Tensor, x_low_TI: Tensor | None, weight_OI: _linear.Weight, a_RI: Tensor, b_OR: Tensor, *, scale: float) -> Tensor:
    """x W^T + scale (x_low A^T) B^T in the dtype of x, W frozen; without `x_low_TI` it is x."""
    return _linear.LowRank.apply(x_TI, x_low_TI, weight_OI, a_RI, b_OR, scale)  # type: ignore[no-any-return, no-untyped-call]


def scaled_low_rank(
    x_TI: Tensor, weight_OI: _linear.Weight, a_RI: Tensor, b_OR: Tensor, magnitude_O: Tensor, norm_O: Tensor, *, scale: float
) -> Tensor:
    """(magnitude / norm) (x W^T + scale (x A^T) B^T) in the dtype of x, W frozen and the norm constant."""
    return _linear.Scaled.apply(x_TI, weight_OI, a_RI, b_OR, magnitude_O, norm_O, scale)  # type: ignore[no-any-return, no-untyped-call]


def packed_attention(
    q_TNH: Tensor, k_TMH: Tensor, v_TMH: Tensor, bounds: Sequence[int], bounds_B: Tensor, *, scale: float, window: int | None
) -> Tensor:
    """Causal attention inside each document; `bounds_B` are the same offsets as int32 on the device."""
    device = _meta_is.get() if q_TNH.is_meta else q_TNH.device.type
    if device == "cuda" and q_TNH.dtype in (torch.bfloat16, torch.float16):
        longest = max(end - start for start, end in pairwise(bounds))
        return packed.varlen_attention(q_TNH, k_TMH, v_TMH, bounds_B, longest, scale=scale, window=window)
    return packed.packed_attention(q_TNH, k_TMH, v_TMH, bounds, scale=scale, window=window)


def _needs_grad(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
