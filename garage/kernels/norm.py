"""RMSNorm (Zhang & Sennrich, arXiv 1910.07467) with a hand-written backward.

Saves x and one number per row. Sums are fp32 (fp64 for fp64 input). With n = x * r, r = 1 / rms and w' = w + offset:

    y = n * w'      dx = r * (dy * w' - n * mean(dy * n * w'))      dw = sum over rows of dy * n

Two forms that differ in rounding alone: Qwen rounds n to x's dtype and multiplies in that dtype, Gemma multiplies in fp32 by
(1 + w) and rounds once.
"""

from typing import Any

import torch
from torch import Tensor


def normalize(x: Tensor, weight: Tensor, eps: float, offset: float, rounds_first: bool) -> tuple[Tensor, Tensor]:
    """The normed rows and 1 / rms of each row."""
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    rstd = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    normal = x * rstd
    if rounds_first:
        return normal.to(x.dtype) * (weight + offset if offset else weight).to(x.dtype), rstd
    return normal.mul_(weight.to(wide) + offset).to(x.dtype), rstd


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
        gain = weight.to(rstd.dtype) + ctx.offset
        normal = x * rstd
        product = grads[0] * normal
        share = (product @ gain).unsqueeze(-1).div_(-x.shape[-1])
        dw = product.flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        dx = torch.mul(grads[0], gain).addcmul_(normal, share).mul_(rstd)
        return dx.to(x.dtype), dw, None, None, None
