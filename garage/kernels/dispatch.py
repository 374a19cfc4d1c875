"""The one place where the path of an op is chosen; models import ops from here and from nowhere else.

With gradients on, an op is its hand-written autograd Function; without, the same arithmetic bare, because building a Function
costs more than a small decode step's work. Attention takes torch's variable-length FlashAttention on CUDA in 16-bit floats, and
the per-document path elsewhere. A tensor on `meta` takes the path of the device it stands for, so that a step's memory can be counted
on any machine.
Elementwise ops on CUDA are Triton kernels (`paths`), and on a CPU that answers they are compiled (`compiled`).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from garage.kernels import compiled, mlp, norm, packed, paged, quant, rope
from garage.kernels import linear as _linear
from garage.kernels.paths import fused, has_dots, is_fused, path
from garage.kernels.table import Lookup

FEW_ROWS = 16  # that are multiplied with the bits of a matrix, without widening it

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
        return path(norm, x).RMSNorm.apply(x, weight, eps, offset, rounds_first)  # type: ignore[no-any-return]
    if (y := compiled.rms_norm(x, weight, eps, offset, rounds_first)) is not None:
        return y
    return path(norm, x).normalize(x, weight, eps, offset, rounds_first)[0]  # type: ignore[no-any-return]


def add_norm(x: Tensor, residual: Tensor, weight: Tensor, *, eps: float, offset: float, rounds_first: bool) -> tuple[Tensor, Tensor]:
    """x + residual, and its norm."""
    if not is_fused(x):
        return (total := x + residual), rms_norm(total, weight, eps=eps, offset=offset, rounds_first=rounds_first)
    if _needs_grad(x, residual, weight):
        return path(norm, x).AddNorm.apply(x, residual, weight, eps, offset, rounds_first)  # type: ignore[no-any-return]
    return path(norm, x).add_normalize(x, residual, weight, eps, offset, rounds_first)[:2]  # type: ignore[no-any-return]


def rotate(x_TNH: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> Tensor:
    """See `reference.rotate`."""
    if _needs_grad(x_TNH):
        return rope.Rotate.apply(x_TNH, cos_TH, sin_TH, path(rope, x_TNH))  # type: ignore[no-any-return, no-untyped-call]
    return path(rope, x_TNH).turn(x_TNH, cos_TH, sin_TH)  # type: ignore[no-any-return]


def norm_rotate(x_TNH: Tensor, weight_H: Tensor, angles: tuple[Tensor, Tensor], *, eps: float, offset: float, rounds_first: bool) -> Tensor:
    """`rotate` of `rms_norm` of each head."""
    if (y_TNH := compiled.norm_rotate(x_TNH, weight_H, angles, eps, offset, rounds_first)) is not None:
        return y_TNH
    if not is_fused(x_TNH):
        return rotate(rms_norm(x_TNH, weight_H, eps=eps, offset=offset, rounds_first=rounds_first), *angles)
    if _needs_grad(x_TNH, weight_H):
        return path(rope, x_TNH).NormRotate.apply(x_TNH, weight_H, *angles, eps, offset, rounds_first)  # type: ignore[no-any-return]
    return path(rope, x_TNH).norm_turn(x_TNH, weight_H, angles, (eps, offset, rounds_first))[0]  # type: ignore[no-any-return]


def gated(gate_TF: Tensor, up_TF: Tensor, *, activation: str) -> Tensor:
    """See `reference.gated`."""
    if _needs_grad(gate_TF, up_TF):
        return mlp.Gated.apply(gate_TF, up_TF, activation, path(mlp, gate_TF))  # type: ignore[no-any-return, no-untyped-call]
    if (y_TF := compiled.gated(gate_TF, up_TF, activation)) is not None:
        return y_TF
    return path(mlp, gate_TF).gate(gate_TF, up_TF, activation)  # type: ignore[no-any-return]


def nf4(weight: Tensor) -> quant.Nf4:
    """See `quant.nf4`."""
    return path(quant, weight).nf4(weight)  # type: ignore[no-any-return]


def nf4_dense(packed_weight: quant.Nf4, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """See `quant.nf4_dense`."""
    are_scales_wide = packed_weight.scales.is_floating_point()  # a foreign checkpoint that is quantised once
    return (quant if are_scales_wide else path(quant, packed_weight.codes)).nf4_dense(packed_weight, shape, dtype)  # type: ignore[no-any-return]


def int8_dense(codes_OI: Tensor, scale_O: Tensor, dtype: torch.dtype) -> Tensor:
    """See `quant.int8_dense`."""
    return path(quant, codes_OI).int8_dense(codes_OI, scale_O, dtype)  # type: ignore[no-any-return]


def linear(x_TI: Tensor, weight_OI: _linear.Weight) -> Tensor:
    """x W^T in the dtype of x, whatever the dtype of W."""
    if isinstance(weight_OI, Tensor) and x_TI.dtype == weight_OI.dtype:
        return F.linear(x_TI, weight_OI)
    if torch.is_grad_enabled() and (x_TI.requires_grad or weight_OI.requires_grad):
        return _linear.CastLinear.apply(x_TI, weight_OI)  # type: ignore[no-any-return, no-untyped-call]
    is_few = not isinstance(weight_OI, Tensor) and x_TI.ndim == 2 and len(x_TI) <= FEW_ROWS and has_dots(x_TI)
    if is_few and (y_TO := weight_OI.product(x_TI)) is not None:  # type: ignore[union-attr]
        return y_TO
    return F.linear(x_TI, _linear.dense(weight_OI, x_TI.dtype))


def int8_product(x_TI: Tensor, codes_OI: Tensor, scale_O: Tensor) -> Tensor:
    """x W^T for a few rows of x, from the codes. `linear` asks for it where it is faster."""
    return fused("gemv").int8(x_TI, codes_OI, scale_O)  # type: ignore[no-any-return]


def nf4_product(x_TI: Tensor, packed_weight: quant.Nf4, outputs: int) -> Tensor | None:
    """As `int8_product`; None if the rows are not whole blocks or the scales are wide."""
    is_fit = x_TI.shape[1] % quant.BLOCK == 0 and not packed_weight.scales.is_floating_point()
    return fused("gemv").nf4(x_TI, packed_weight, outputs) if is_fit else None


def dense(weight_OI: _linear.Weight, dtype: torch.dtype) -> Tensor:
    """Any weight as a matrix in `dtype`."""
    return _linear.dense(weight_OI, dtype)


def lookup(tokens_T: Tensor, weight_VD: Tensor) -> Tensor:
    """The row of each token."""
    if torch.is_grad_enabled() and weight_VD.requires_grad:
        return Lookup.apply(tokens_T, weight_VD)  # type: ignore[no-any-return, no-untyped-call]
    return F.embedding(tokens_T, weight_VD)


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


def paged_kernels(q_TNH: Tensor, pool: Tensor) -> Any | None:
    """What writes and attends over such pages: `triton_paged`, `compiled`, or None where queries take the plain paths of `paged`."""
    if compiled.takes_pages(q_TNH, pool):
        return compiled
    return path(paged, q_TNH) if has_dots(q_TNH) else None


def _needs_grad(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
