"""`rope.py` in Triton, with the norm of queries and keys that stands before it: one pass over them instead of three.

y = turn(norm(x)). The backward turns the gradient back and then goes through the norm, from the raw x and 1 / rms of each head: the normed
values are never stored. A row is one head of one token, in two halves.

Limits: as in `triton_norm.py`; the angles have no gradient.

Shape suffixes: T packed tokens, N heads, H head width (of the angles: half of it).
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from garage.kernels.triton_norm import PROGRAMS, scaled, tile

Angles = tuple[Tensor, Tensor]
Form = tuple[float, float, bool]


@triton.jit
def _forward(
    x_ptr, weight_ptr, cos_ptr, sin_ptr, y_ptr, rstd_ptr, rows, heads, half, eps, offset, sign,
    FIRST: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (column < half)[None, :]
    at, angle = row[:, None] * (2 * half) + column[None, :], (row // heads)[:, None] * half + column[None, :]
    a, b = tl.load(x_ptr + at, mask, 0.0), tl.load(x_ptr + at + half, mask, 0.0)
    RAW: tl.constexpr = a.dtype
    a, b = a.to(tl.float32), b.to(tl.float32)
    if weight_ptr is not None:
        rstd = tl.rsqrt(tl.sum(a * a + b * b, 1) / (2 * half) + eps)
        tl.store(rstd_ptr + row, rstd, row < rows)
        first = tl.load(weight_ptr + column, column < half, 0.0)[None, :]
        second = tl.load(weight_ptr + half + column, column < half, 0.0)[None, :]
        a = scaled(a * rstd[:, None], first, offset, RAW, FIRST).to(RAW).to(tl.float32)
        b = scaled(b * rstd[:, None], second, offset, RAW, FIRST).to(RAW).to(tl.float32)
    cos, sin = tl.load(cos_ptr + angle, mask, 0.0).to(tl.float32), tl.load(sin_ptr + angle, mask, 0.0).to(tl.float32) * sign
    tl.store(y_ptr + at, a * cos - b * sin, mask)
    tl.store(y_ptr + at + half, b * cos + a * sin, mask)


@triton.jit
def _backward(
    dy_ptr, x_ptr, weight_ptr, cos_ptr, sin_ptr, rstd_ptr, dx_ptr, dw_ptr, rows, heads, half, offset,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK)
    first = tl.load(weight_ptr + column, column < half, 0.0).to(tl.float32)[None, :] + offset
    second = tl.load(weight_ptr + half + column, column < half, 0.0).to(tl.float32)[None, :] + offset
    dw_first, dw_second = tl.zeros((ROWS, BLOCK), tl.float32), tl.zeros((ROWS, BLOCK), tl.float32)
    for step in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = (step * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        mask = (row < rows)[:, None] & (column < half)[None, :]
        at, angle = row[:, None] * (2 * half) + column[None, :], (row // heads)[:, None] * half + column[None, :]
        cos, sin = tl.load(cos_ptr + angle, mask, 0.0).to(tl.float32), tl.load(sin_ptr + angle, mask, 0.0).to(tl.float32)
        p, q = tl.load(dy_ptr + at, mask, 0.0).to(tl.float32), tl.load(dy_ptr + at + half, mask, 0.0).to(tl.float32)
        da, db = p * cos + q * sin, q * cos - p * sin
        rstd = tl.load(rstd_ptr + row, row < rows, 0.0)[:, None]
        a = tl.load(x_ptr + at, mask, 0.0).to(tl.float32) * rstd
        b = tl.load(x_ptr + at + half, mask, 0.0).to(tl.float32) * rstd
        share = tl.sum(da * a * first + db * b * second, 1)[:, None] / (2 * half)
        tl.store(dx_ptr + at, (da * first - a * share) * rstd, mask)
        tl.store(dx_ptr + at + half, (db * second - b * share) * rstd, mask)
        if dw_ptr is not None:
            dw_first += da * a
            dw_second += db * b
    if dw_ptr is not None:
        tl.store(dw_ptr + tl.program_id(0) * 2 * half + column, tl.sum(dw_first, 0), column < half)
        tl.store(dw_ptr + tl.program_id(0) * 2 * half + half + column, tl.sum(dw_second, 0), column < half)


def turn(x_TNH: Tensor, cos_TH: Tensor, sin_TH: Tensor, sign: float = 1.0) -> Tensor:
    """See `rope.turn`."""
    return _turned(x_TNH.contiguous(), None, (cos_TH, sin_TH), (0.0, 0.0, False), sign)[0]


def norm_turn(x_TNH: Tensor, weight_H: Tensor, angles: Angles, form: Form) -> tuple[Tensor, Tensor]:
    """The heads after norm and turn, and 1 / rms of each; `form` is eps, offset and `rounds_first` of the norm."""
    return _turned(x_TNH.contiguous(), weight_H, angles, form)


def _turned(x_TNH: Tensor, weight_H: Tensor | None, angles: Angles, form: Form, sign: float = 1.0) -> tuple[Tensor, Tensor]:
    (cos_TH, sin_TH), (eps, offset, first), (tokens, heads, width) = (t.contiguous() for t in angles), form, x_TNH.shape
    y_TNH, size = torch.empty_like(x_TNH), _tile(x_TNH)
    rstd_TN = torch.empty((tokens, heads) if weight_H is not None else 0, dtype=torch.float32, device=x_TNH.device)
    grid = (triton.cdiv(tokens * heads, size["ROWS"]),)
    rows = (tokens * heads, heads, width // 2)
    _forward[grid](x_TNH, weight_H, cos_TH, sin_TH, y_TNH, rstd_TN, *rows, eps, offset, sign, FIRST=first, **size)
    return y_TNH, rstd_TN


def _tile(x_TNH: Tensor) -> dict[str, int]:
    """Of the norm, in two halves."""
    size = tile(x_TNH.shape[2], x_TNH.dtype)
    return size | {"BLOCK": size["BLOCK"] // 2}


def backward(
    dy_TNH: Tensor, x_TNH: Tensor, weight_H: Tensor, rstd_TN: Tensor, angles: Angles, offset: float, *, trains_weight: bool = True
) -> tuple[Tensor, Tensor | None]:
    """The gradient of x, and that of the weight, if it is trained."""
    (cos_TH, sin_TH), (tokens, heads, width) = (t.contiguous() for t in angles), x_TNH.shape
    dx_TNH, size = torch.empty_like(x_TNH), _tile(x_TNH)
    tiles = triton.cdiv(tokens * heads, size["ROWS"])
    programs = min(tiles, PROGRAMS) if trains_weight else tiles
    dw = torch.empty(programs, width, dtype=torch.float32, device=x_TNH.device) if trains_weight else None
    rows = (tokens * heads, heads, width // 2)
    _backward[(programs,)](dy_TNH.contiguous(), x_TNH, weight_H, cos_TH, sin_TH, rstd_TN, dx_TNH, dw, *rows, offset, **size)
    return dx_TNH, dw.sum(0).to(weight_H.dtype) if dw is not None else None


class NormRotate(torch.autograd.Function):
    """`norm_turn` with gradients for x and, if it is trained, the weight."""

    @staticmethod
    def forward(ctx: Any, x_TNH: Tensor, weight_H: Tensor, cos_TH: Tensor, sin_TH: Tensor, *form: Any) -> Tensor:
        x_TNH = x_TNH.contiguous()
        y_TNH, rstd_TN = norm_turn(x_TNH, weight_H, (cos_TH, sin_TH), form)  # type: ignore[arg-type]
        ctx.save_for_backward(x_TNH, weight_H, rstd_TN, cos_TH, sin_TH)
        ctx.offset = form[1]
        return y_TNH

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TNH, weight_H, rstd_TN, *angles = ctx.saved_tensors
        slopes = backward(grads[0], x_TNH, weight_H, rstd_TN, tuple(angles), ctx.offset, trains_weight=ctx.needs_input_grad[1])
        return *slopes, None, None, None, None, None
