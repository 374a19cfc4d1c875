"""`norm.py` in Triton: RMSNorm forward and backward, each with the sum that stands beside it in a residual stream.

Forward, with a residual r: s = x + r (rounded as torch rounds it), y = norm(s). Backward, with what s gets from elsewhere: ds = that + the
norm's own. So a block reads and writes its stream once where torch would three times. A program takes some rows; the gradient of the weight
is summed per program in fp32 and then over programs, so that equal inputs give equal bits.

Limits: a row is held in registers, so widths beyond 16,384 spill; inputs are made contiguous; float64 is left to `norm.py`.

Shape suffixes: D model width.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 512  # that sum the gradient of a weight


@triton.jit
def scaled(normal, weight, offset, RAW: tl.constexpr, FIRST: tl.constexpr):
    """normal * (weight + offset) in fp32, rounded as `reference.rms_norm` rounds: `RAW` is the dtype of the rows."""
    gain = weight.to(tl.float32) + offset
    if FIRST:
        return normal.to(RAW).to(tl.float32) * gain.to(weight.dtype).to(RAW).to(tl.float32)
    return normal * gain


@triton.jit
def _forward(
    x_ptr, residual_ptr, weight_ptr, y_ptr, sum_ptr, rstd_ptr, rows, width, eps, offset,
    FIRST: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (column < width)[None, :]
    at = row[:, None] * width + column[None, :]
    x = tl.load(x_ptr + at, mask, 0.0)
    if residual_ptr is not None:
        x = (x.to(tl.float32) + tl.load(residual_ptr + at, mask, 0.0).to(tl.float32)).to(x.dtype)
        tl.store(sum_ptr + at, x, mask)
    wide = x.to(tl.float32)
    rstd = tl.rsqrt(tl.sum(wide * wide, 1) / width + eps)
    tl.store(rstd_ptr + row, rstd, row < rows)
    weight = tl.load(weight_ptr + column, column < width, 0.0)[None, :]
    tl.store(y_ptr + at, scaled(wide * rstd[:, None], weight, offset, x.dtype, FIRST), mask)


@triton.jit
def _backward(dy_ptr, x_ptr, weight_ptr, rstd_ptr, other_ptr, dx_ptr, dw_ptr, rows, width, offset, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    gain = tl.load(weight_ptr + column, column < width, 0.0).to(tl.float32)[None, :] + offset
    dw = tl.zeros((ROWS, BLOCK), tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        mask = (row < rows)[:, None] & (column < width)[None, :]
        at = row[:, None] * width + column[None, :]
        dy = tl.load(dy_ptr + at, mask, 0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, row < rows, 0.0)[:, None]
        normal = tl.load(x_ptr + at, mask, 0.0).to(tl.float32) * rstd
        share = tl.sum(dy * normal * gain, 1)[:, None] / width
        dx = (dy * gain - normal * share) * rstd
        if other_ptr is not None:
            dx += tl.load(other_ptr + at, mask, 0.0).to(tl.float32)
        tl.store(dx_ptr + at, dx, mask)
        if dw_ptr is not None:
            dw += dy * normal
    if dw_ptr is not None:
        tl.store(dw_ptr + tl.program_id(0) * width + column, tl.sum(dw, 0), column < width)


def tile(width: int, dtype: torch.dtype) -> dict[str, int]:
    """Rows and columns of a program's tile and its warps: 2,048 numbers, or one row if that is more, and 32 bytes of it a thread."""
    block = triton.next_power_of_2(width)
    rows = max(1, 2048 // block)
    return {"ROWS": rows, "BLOCK": block, "num_warps": min(32, max(4, rows * block * dtype.itemsize // 1024))}


def normalize(x: Tensor, weight: Tensor, eps: float, offset: float, rounds_first: bool) -> tuple[Tensor, Tensor]:
    """See `norm.normalize`."""
    return _normalized(x.contiguous(), None, None, weight, (eps, offset, rounds_first))


def add_normalize(x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float, rounds_first: bool) -> tuple[Tensor, ...]:
    """x + residual, its normed rows, and 1 / rms of each row."""
    assert x.dtype == residual.dtype and x.shape == residual.shape, (x.dtype, residual.dtype, x.shape, residual.shape)
    total = torch.empty_like(x, memory_format=torch.contiguous_format)
    return total, *_normalized(x.contiguous(), residual.contiguous(), total, weight, (eps, offset, rounds_first))


def _normalized(
    x: Tensor, residual: Tensor | None, total: Tensor | None, weight: Tensor, form: tuple[float, float, bool]
) -> tuple[Tensor, Tensor]:
    (eps, offset, first), width = form, x.shape[-1]
    y, rstd = torch.empty_like(x), torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    size = tile(width, x.dtype)
    grid = (triton.cdiv(rstd.numel(), size["ROWS"]),)
    _forward[grid](x, residual, weight, y, total, rstd, rstd.numel(), width, eps, offset, FIRST=first, **size)
    return y, rstd


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, offset: float, *, other: Tensor | None = None, trains_weight: bool = True
) -> tuple[Tensor, Tensor | None]:
    """The gradient of x, plus `other`, and that of the weight, if it is trained."""
    dy, dx, width, rows = dy.contiguous(), torch.empty_like(x), x.shape[-1], rstd.numel()
    size = tile(width, x.dtype)
    tiles = triton.cdiv(rows, size["ROWS"])
    programs = min(tiles, PROGRAMS) if trains_weight else tiles
    dw = torch.empty(programs, width, dtype=torch.float32, device=x.device) if trains_weight else None
    other = other.contiguous() if other is not None else None
    _backward[(programs,)](dy, x, weight, rstd, other, dx, dw, rows, width, offset, **size)
    return dx, dw.sum(0).to(weight.dtype) if dw is not None else None


class RMSNorm(torch.autograd.Function):
    """See `norm.RMSNorm`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float, rounds_first: bool) -> Tensor:
        x = x.contiguous()
        y, rstd = normalize(x, weight, eps, offset, rounds_first)
        ctx.save_for_backward(x, weight, rstd)
        ctx.offset = offset
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        return *backward(grads[0], x, weight, rstd, ctx.offset, trains_weight=ctx.needs_input_grad[1]), None, None, None


class AddNorm(torch.autograd.Function):
    """`add_normalize` with gradients: the sum and its norm."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float, rounds_first: bool
    ) -> tuple[Tensor, Tensor]:
        total, y, rstd = add_normalize(x, residual, weight, eps, offset, rounds_first)
        ctx.save_for_backward(total, weight, rstd)
        ctx.offset = offset
        return total, y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        total, weight, rstd = ctx.saved_tensors
        dx, dw = backward(grads[1], total, weight, rstd, ctx.offset, other=grads[0], trains_weight=ctx.needs_input_grad[2])
        return dx, dx, dw, None, None, None
