"""RMSNorm (Zhang & Sennrich, arXiv 1910.07467) with a hand-written backward.

Saves x and one number per row. Sums are fp32 (fp64 for fp64 input). With n = x * r, r = 1 / rms and w' = w + offset:

    y = n * w'      dx = r * (dy * w' - n * mean(dy * n * w'))      dw = sum over rows of dy * n

Large inputs are taken in pieces of rows, so that the fp32 tensors between stay in the cache.

Two forms that differ in rounding alone: Qwen rounds n to x's dtype and multiplies in that dtype, Gemma multiplies in fp32 by
(1 + w) and rounds once.
"""

from typing import Any

import torch
from torch import Tensor

PIECE = 1 << 19  # numbers normed at once


def normalize(x: Tensor, weight: Tensor, eps: float, offset: float, rounds_first: bool) -> tuple[Tensor, Tensor]:
    """The normed rows and 1 / rms of each row."""
    if x.numel() <= PIECE:
        return _normed(x, weight, eps, offset, rounds_first)
    y = torch.empty_like(x)
    rstd = torch.empty((*x.shape[:-1], 1), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    for rows in () if x.is_meta else _pieces(x):
        y[rows], rstd[rows] = _normed(x[rows], weight, eps, offset, rounds_first)
    return y, rstd


class RMSNorm(torch.autograd.Function):
    """`normalize` with gradients for x and, if it is trained, the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float, rounds_first: bool) -> Tensor:
        y, rstd = normalize(x, weight, eps, offset, rounds_first)
        ctx.save_for_backward(x, weight, rstd)
        ctx.offset = offset
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        x, weight, rstd = ctx.saved_tensors
        gain, dx = weight.to(rstd.dtype) + ctx.offset, torch.empty_like(x)
        dw = torch.zeros_like(gain) if ctx.needs_input_grad[1] else None
        for rows in () if x.is_meta else _pieces(x):
            normal = x[rows] * rstd[rows]
            product = grads[0][rows] * normal
            if dw is not None:
                dw += product.flatten(0, -2).sum(0)
            share = (product @ gain).unsqueeze(-1).div_(-x.shape[-1])
            dx[rows] = torch.mul(grads[0][rows], gain, out=product).addcmul_(normal, share).mul_(rstd[rows])
        return dx, None if dw is None else dw.to(weight.dtype), None, None, None


def _normed(x: Tensor, weight: Tensor, eps: float, offset: float, rounds_first: bool) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    rstd = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    normal = x * rstd
    if rounds_first:
        return normal.to(x.dtype) * (weight + offset if offset else weight).to(x.dtype), rstd
    return normal.mul_(weight.to(wide) + offset).to(x.dtype), rstd


def _pieces(x: Tensor) -> list[slice]:
    """Cuts along the first axis."""
    step = max(1, PIECE * len(x) // max(1, x.numel()))
    return [slice(first, first + step) for first in range(0, len(x), step)]
