"""Products with a weight matrix whose dtype may differ from the activations', and their low-rank extension.

A trainer keeps fp32 master weights, or a frozen bf16 base beside fp32 adapters, and computes in the dtype of the activations.
The weight is cast where it is used, in the forward and again in the backward: that costs one pass over the weight, and no second
copy of the model is held between the two. Gradients come back in the parameter's own dtype. A frozen weight gets none, and may be one
that is held in few bits (`Widened`).

LoRA (Hu et al., arXiv 2106.09685): y = W x + s B A x, with W frozen. The backward saves x and A x only.

DoRA (arXiv 2402.09353): y = (m / n) (W x + s B A x) with n held constant. dm = sum over tokens of dy * y / m, and y is what comes after
keeps anyway, so DoRA saves nothing that LoRA does not.

Shape suffixes: T packed tokens, I inputs, O outputs, R rank.
"""

from typing import Any, Protocol

import torch
from torch import Tensor

from garage.kernels import columns
from garage.kernels.paths import path


class Widened(Protocol):
    """A frozen matrix in few bits."""

    shape: torch.Size
    dtype: torch.dtype
    requires_grad: bool

    @property
    def device(self) -> torch.device: ...

    def dense(self, dtype: torch.dtype, rows: slice = slice(None)) -> Tensor:
        """The matrix, or some of its rows, in `dtype`."""

    def product(self, x_TI: Tensor) -> Tensor | None:
        """x W^T of a few rows on a GPU without widening the matrix, or None if it has to be widened."""


Weight = Tensor | Widened
PIECE = 1 << 22  # numbers of a gradient scaled at once


def dense(weight_OI: Weight, dtype: torch.dtype) -> Tensor:
    """Any weight as a matrix in `dtype`."""
    return weight_OI.to(dtype) if isinstance(weight_OI, Tensor) else weight_OI.dense(dtype)


class CastLinear(torch.autograd.Function):
    """x W^T with W cast to x's dtype on the way."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, weight_OI: Weight) -> Tensor:
        ctx.save_for_backward(*((x_TI, weight_OI) if isinstance(weight_OI, Tensor) and weight_OI.requires_grad else ()))
        ctx.weight = weight_OI
        return x_TI @ dense(weight_OI, x_TI.dtype).T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        saved, weight_OI = ctx.saved_tensors, ctx.weight
        dx = grads[0] @ dense(weight_OI, grads[0].dtype) if ctx.needs_input_grad[0] else None
        dw = (grads[0].T @ saved[0]).to(weight_OI.dtype) if saved and ctx.needs_input_grad[1] else None
        return dx, dw


class LowRank(torch.autograd.Function):
    """x W^T + scale (x_low A^T) B^T with W frozen; `x_low` is x after dropout, or None for x itself."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, x_low_TI: Tensor | None, weight_OI: Weight, a_RI: Tensor, b_OR: Tensor, scale: float) -> Tensor:
        low_TI = x_TI if x_low_TI is None else x_low_TI
        low_TR = low_TI @ a_RI.to(x_TI.dtype).T
        ctx.save_for_backward(low_TI, low_TR, a_RI, b_OR)
        ctx.weight, ctx.scale, ctx.is_shared = weight_OI, scale, x_low_TI is None
        return (x_TI @ dense(weight_OI, x_TI.dtype).T).addmm_(low_TR, b_OR.to(x_TI.dtype).T, alpha=scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, Tensor, Tensor, None]:
        low_TI, low_TR, a_RI, b_OR = ctx.saved_tensors
        dy, a_RI = grads[0], a_RI.to(grads[0].dtype)
        dlow_TR = (dy @ b_OR.to(dy.dtype)).mul_(ctx.scale)
        dx = dy @ dense(ctx.weight, dy.dtype) if ctx.needs_input_grad[0] else None
        if dx is not None and ctx.is_shared:
            dx.addmm_(dlow_TR, a_RI)
        dx_low = dlow_TR @ a_RI if ctx.needs_input_grad[1] else None
        return dx, dx_low, None, dlow_TR.T @ low_TI, (dy.T @ low_TR).mul_(ctx.scale), None


class Scaled(torch.autograd.Function):
    """(m / n) (x W^T + scale (x A^T) B^T) with W frozen and n constant; an m of exactly 0 gets no gradient."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, weight_OI: Weight, a_RI: Tensor, b_OR: Tensor, *rest: Any) -> Tensor:
        magnitude_O, norm_O, scale = rest
        low_TR = x_TI @ a_RI.to(x_TI.dtype).T
        y_TO = (x_TI @ dense(weight_OI, x_TI.dtype).T).addmm_(low_TR, b_OR.to(x_TI.dtype).T, alpha=scale)
        path(columns, y_TO).scale_(y_TO, (magnitude_O / norm_O).to(x_TI.dtype))
        ctx.save_for_backward(x_TI, low_TR, y_TO, a_RI, b_OR, magnitude_O, norm_O)
        ctx.weight, ctx.scale = weight_OI, scale
        return y_TO

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, Tensor, Tensor, Tensor, None, None]:
        x_TI, low_TR, y_TO, a_RI, b_OR, magnitude_O, norm_O = ctx.saved_tensors
        dm, db, dx = torch.zeros_like(magnitude_O), torch.zeros_like(b_OR), None
        dlow_TR = torch.empty_like(low_TR)
        gain_O, b_low = (magnitude_O / norm_O).to(y_TO.dtype), b_OR.to(y_TO.dtype)
        if ctx.needs_input_grad[0]:
            dx, weight_OI = torch.empty_like(x_TI), dense(ctx.weight, y_TO.dtype)
        step = max(64, PIECE // len(dm))
        for rows in (slice(first, first + step) for first in range(0, len(x_TI), step)):
            dy = grads[0][rows].clone()
            dm += path(columns, dy).scale_and_sum_(dy, y_TO[rows], gain_O)
            torch.mm(dy, b_low, out=dlow_TR[rows]).mul_(ctx.scale)
            db += dy.T @ low_TR[rows]
            if dx is not None:
                torch.mm(dy, weight_OI, out=dx[rows])
        if dx is not None:
            dx.addmm_(dlow_TR, a_RI.to(dx.dtype))
        dm = torch.where(magnitude_O == 0, 0, dm / magnitude_O)
        return dx, None, dlow_TR.T @ x_TI, db.mul_(ctx.scale), dm, None, None
