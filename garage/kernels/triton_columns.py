"""`columns.py` in Triton: a program takes some columns and every so-many-th tile of rows; its sums are fp32 and added over programs after.

Shape suffixes: T packed tokens, O outputs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS, SHARES = 16, 128, 64  # of a tile; how many programs share the rows of a sum


@triton.jit
def _scale(y_ptr, dy_ptr, gain_ptr, sum_ptr, rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """y is only read, and there are sums, if there is a dy; else it is multiplied itself."""
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    gain = tl.load(gain_ptr + column, column < width, 0.0).to(tl.float32)[None, :]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        mask = (row < rows)[:, None] & (column < width)[None, :]
        at = row[:, None] * width + column[None, :]
        y = tl.load(y_ptr + at, mask, 0.0).to(tl.float32)
        if dy_ptr is None:
            tl.store(y_ptr + at, y * gain, mask)
        else:
            dy = tl.load(dy_ptr + at, mask, 0.0).to(tl.float32)
            total += dy * y
            tl.store(dy_ptr + at, dy * gain, mask)
    if sum_ptr is not None:
        tl.store(sum_ptr + tl.program_id(0) * width + column, tl.sum(total, 0), column < width)


def scale_(y_TO: Tensor, gain_O: Tensor) -> Tensor:
    """See `columns.scale_`."""
    _launch(y_TO, None, gain_O, None, -(-len(y_TO) // ROWS))
    return y_TO


def scale_and_sum_(dy_TO: Tensor, y_TO: Tensor, gain_O: Tensor) -> Tensor:
    """See `columns.scale_and_sum_`."""
    shares = min(SHARES, -(-len(y_TO) // ROWS))
    sums = torch.empty(shares, y_TO.shape[1], dtype=torch.float32, device=y_TO.device)
    _launch(y_TO.contiguous(), dy_TO, gain_O, sums, shares)
    return sums.sum(0)


def _launch(y_TO: Tensor, dy_TO: Tensor | None, gain_O: Tensor, sums: Tensor | None, shares: int) -> None:
    assert y_TO.is_contiguous() and (dy_TO is None or (dy_TO.is_contiguous() and dy_TO.shape == y_TO.shape)), y_TO.shape
    grid = (shares, triton.cdiv(y_TO.shape[1], COLUMNS))
    _scale[grid](y_TO, dy_TO, gain_O.contiguous(), sums, *y_TO.shape, ROWS=ROWS, COLUMNS=COLUMNS)
