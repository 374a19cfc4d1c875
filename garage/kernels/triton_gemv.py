"""Products of a few rows with a matrix in few bits, straight from the bits: decoding then reads a half or a quarter of the bytes.

The matrix is the dot's left side, the rows of x its columns, and each number is widened in registers. NF4 numbers are those of the widened
matrix; int8 codes are exact in every float, and their scale is applied to the sum, which saves a rounding.

Limits: at most `ROWS` rows, beyond which widening the matrix once costs less than it saves; NF4 rows of whole blocks.

Shape suffixes: T rows of x, O outputs, I inputs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from garage.kernels.quant import BLOCK, Nf4, code_book
from garage.kernels.triton_quant import levels

ROWS = 16
OUTPUTS = 16  # of a program


@triton.jit
def _int8(x_ptr, codes_ptr, scale_ptr, y_ptr, rows, outputs, inputs, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr):
    output, row = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS), tl.arange(0, ROWS)
    total = tl.zeros((OUTPUTS, ROWS), tl.float32)
    for start in range(0, inputs, INPUTS):
        column = start + tl.arange(0, INPUTS)
        at, is_code = output.to(tl.int64)[:, None] * inputs + column[None, :], (output < outputs)[:, None] & (column < inputs)[None, :]
        codes = tl.load(codes_ptr + at, is_code, 0)
        x = tl.load(x_ptr + row[None, :] * inputs + column[:, None], (row < rows)[None, :] & (column < inputs)[:, None], 0.0)
        total = tl.dot(codes.to(tl.float32).to(x.dtype), x, total, input_precision="ieee")
    scale = tl.load(scale_ptr + output, output < outputs, 0.0)
    tl.store(y_ptr + row[None, :] * outputs + output[:, None], total * scale[:, None], (row < rows)[None, :] & (output < outputs)[:, None])


@triton.jit
def _nf4(
    x_ptr, codes_ptr, scales_ptr, max_ptr, offset_ptr, book_ptr, levels_ptr, y_ptr, rows, outputs, inputs,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr,
):  # fmt: skip
    output, row, byte = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS), tl.arange(0, ROWS), tl.arange(0, 128)
    total, is_row = tl.zeros((OUTPUTS, ROWS), tl.float32), (row < rows)[None, :]
    for start in range(0, inputs, 256):
        block = (output.to(tl.int64) * inputs + start)[:, None] // 64 + tl.arange(0, 4)[None, :]
        is_real = (output < outputs)[:, None] & (start + 64 * tl.arange(0, 4) < inputs)[None, :]
        scale = tl.load(book_ptr + tl.load(scales_ptr + block, is_real, 0).to(tl.int32))
        scale = (scale * tl.load(max_ptr + block // 256, is_real, 0.0) + tl.load(offset_ptr))[:, :, None]
        codes = tl.load(codes_ptr + block[:, :, None] * 32 + tl.arange(0, 32)[None, None, :], is_real[:, :, None], 0).to(tl.int32)
        at, is_x = row[None, :] * inputs + start + 2 * byte[:, None], is_row & (start + 2 * byte < inputs)[:, None]
        first, second = tl.load(x_ptr + at, is_x, 0.0), tl.load(x_ptr + at + 1, is_x, 0.0)
        high = tl.reshape((tl.load(levels_ptr + (codes >> 4)) * scale).to(first.dtype), (OUTPUTS, 128))
        low = tl.reshape((tl.load(levels_ptr + (codes & 15)) * scale).to(first.dtype), (OUTPUTS, 128))
        total = tl.dot(high, first, total, input_precision="ieee")
        total = tl.dot(low, second, total, input_precision="ieee")
    tl.store(y_ptr + row[None, :] * outputs + output[:, None], total, is_row & (output < outputs)[:, None])


def int8(x_TI: Tensor, codes_OI: Tensor, scale_O: Tensor) -> Tensor:
    """x W^T in the dtype of x."""
    (rows, inputs), outputs = x_TI.shape, len(codes_OI)
    y_TO = torch.empty(rows, outputs, dtype=x_TI.dtype, device=x_TI.device)
    form = {"ROWS": ROWS, "OUTPUTS": OUTPUTS, "INPUTS": 256 if x_TI.element_size() == 2 else 64}
    _int8[(triton.cdiv(outputs, OUTPUTS),)](x_TI.contiguous(), codes_OI, scale_O, y_TO, rows, outputs, inputs, **form)
    return y_TO


def nf4(x_TI: Tensor, packed: Nf4, outputs: int) -> Tensor:
    """x W^T in the dtype of x; I is a multiple of the block."""
    rows, inputs = x_TI.shape
    assert inputs % BLOCK == 0 and not packed.scales.is_floating_point(), (inputs, packed.scales.dtype)
    y_TO, device = torch.empty(rows, outputs, dtype=x_TI.dtype, device=x_TI.device), x_TI.device
    tables = (*packed, code_book(device), levels(device)[0])
    _nf4[(triton.cdiv(outputs, OUTPUTS),)](x_TI.contiguous(), *tables, y_TO, rows, outputs, inputs, ROWS=ROWS, OUTPUTS=OUTPUTS)
    return y_TO
