"""`quant.py` in Triton: NF4 codes from a matrix, and NF4 and int8 by row widened to any float dtype in one pass.

Codes equal `quant.nf4`'s and widened numbers `quant.nf4_dense`'s bit for bit: divisions round as IEEE says and products are not fused with
sums. The doubly quantised scales are read through the code book while widening, so wide scales are never stored.

Shape suffixes: N numbers of a matrix, K blocks of 64, O rows, I columns.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from garage.kernels.quant import BLOCK, LEVELS, Nf4, bytes_of, code_book

GROUP = 32  # blocks a program takes
COLUMNS = 1024


@triton.jit
def _nf4(weight_ptr, middles_ptr, codes_ptr, scale_ptr, numel, GROUP: tl.constexpr):
    block = tl.program_id(0).to(tl.int64) * GROUP + tl.arange(0, GROUP)
    at = block[:, None] * 64 + tl.arange(0, 64)[None, :]
    weight = tl.load(weight_ptr + at, at < numel, 0.0).to(tl.float32)
    scale = tl.max(tl.abs(weight), 1)
    tl.store(scale_ptr + block, scale, block * 64 < numel)
    unit = weight * tl.where(scale > 0, tl.div_rn(1.0, tl.where(scale > 0, scale, 1.0)), 0.0)[:, None]
    code = tl.zeros((GROUP, 64), tl.int32)
    for level in tl.static_range(15):
        code += (unit > tl.load(middles_ptr + level)).to(tl.int32)
    high, low = tl.split(tl.reshape(code, (GROUP, 32, 2)))
    place = block[:, None] * 32 + tl.arange(0, 32)[None, :]
    tl.store(codes_ptr + place, (high * 16 + low).to(tl.uint8), (block * 64 < numel)[:, None])


@triton.jit
def _nf4_dense(codes_ptr, scales_ptr, max_ptr, offset_ptr, book_ptr, levels_ptr, out_ptr, numel, GROUP: tl.constexpr):
    block = tl.program_id(0).to(tl.int64) * GROUP + tl.arange(0, GROUP)
    real = block * 64 < numel
    book = tl.load(book_ptr + tl.load(scales_ptr + block, real, 0).to(tl.int32))
    scale = book * tl.load(max_ptr + block // 256, real, 0.0) + tl.load(offset_ptr)
    codes = tl.load(codes_ptr + block[:, None] * 32 + tl.arange(0, 32)[None, :], real[:, None], 0).to(tl.int32)
    two = tl.join(tl.load(levels_ptr + (codes >> 4)), tl.load(levels_ptr + (codes & 15)))
    at = block[:, None] * 64 + tl.arange(0, 64)[None, :]
    tl.store(out_ptr + at, tl.reshape(two, (GROUP, 64)) * scale[:, None], at < numel)


@triton.jit
def _int8_dense(codes_ptr, scale_ptr, out_ptr, width, COLUMNS: tl.constexpr):
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    codes = tl.load(codes_ptr + row * width + column, column < width, 0).to(tl.float32)
    tl.store(out_ptr + row * width + column, codes * tl.load(scale_ptr + row), column < width)


def nf4(weight: Tensor) -> Nf4:
    """See `quant.nf4`."""
    weight, blocks = weight.detach().contiguous(), -(-weight.numel() // BLOCK)
    codes = torch.empty(blocks * BLOCK // 2, dtype=torch.uint8, device=weight.device)
    scale_K = torch.empty(blocks, dtype=torch.float32, device=weight.device)
    middles = levels(weight.device)[1]
    _nf4[(triton.cdiv(blocks, GROUP),)](weight, middles, codes, scale_K, weight.numel(), GROUP=GROUP, enable_fp_fusion=False)
    offset = scale_K.mean()
    return Nf4(codes, *bytes_of(scale_K - offset), offset)


def nf4_dense(packed: Nf4, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """See `quant.nf4_dense`."""
    out, device = torch.empty(shape, dtype=dtype, device=packed.codes.device), packed.codes.device
    grid = (triton.cdiv(len(packed.scales), GROUP),)
    _nf4_dense[grid](*packed, code_book(device), levels(device)[0], out, out.numel(), GROUP=GROUP, enable_fp_fusion=False)
    return out


def int8_dense(codes_OI: Tensor, scale_O: Tensor, dtype: torch.dtype) -> Tensor:
    """See `quant.int8_dense`."""
    out_OI = torch.empty(codes_OI.shape, dtype=dtype, device=codes_OI.device)
    rows, width = codes_OI.shape
    _int8_dense[(rows, triton.cdiv(width, COLUMNS))](codes_OI.contiguous(), scale_O, out_OI, width, COLUMNS=COLUMNS)
    return out_OI


@cache
def levels(device: torch.device) -> tuple[Tensor, Tensor]:
    """The 16 levels and what lies halfway between them."""
    levels = torch.tensor(LEVELS, device=device)
    return levels, (levels[1:] + levels[:-1]) / 2
