"""Numbers in few bits: NF4 with doubly quantised scales and int8 by row for frozen matrices, an 8-bit code for optimizer states.

NF4 (Dettmers et al., arXiv 2305.14314): a matrix, row after row, is cut into blocks of 64; a number is the nearest of 16 levels times its
block's largest magnitude. These scales, less their mean, are stored as 8-bit codes in blocks of 256 with one fp32 number each: 4.127 bits a
weight. Codes, nibble order (first number high) and the 8-bit code book are bitsandbytes', so its checkpoints load and ours equal them.

Int8: a row is its numbers divided by a 127th of the largest magnitude, rounded.

Widening on CPU is a compiled loop where there is a compiler (`native`). In torch, which is its reference, it reads two numbers at once from
a table of all 256 bytes, scales them in fp32 and rounds once, in pieces that stay in the cache (`bench/qlora_vs_bnb.py`).

Shape suffixes: N numbers of a matrix, B bytes of two, K blocks of 64, O rows, I columns.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from garage.kernels import native

LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
BLOCK, SCALES = 64, 256
PIECE = 1 << 18  # bytes widened at once


class Nf4(NamedTuple):
    """A matrix of N numbers: codes [B] uint8, scale codes [K] uint8, their scales fp32, their mean fp32.

    Files of bitsandbytes without double quantisation hold the scales themselves: then `scales` is fp32 [K] and `scale_max` is empty.
    """

    codes: Tensor
    scales: Tensor
    scale_max: Tensor
    offset: Tensor


def nf4(weight: Tensor) -> Nf4:
    """Quantise; a last block that is not full is filled with zeros."""
    flat_N = weight.detach().flatten().float()
    blocks = F.pad(flat_N, (0, -len(flat_N) % BLOCK)).view(-1, BLOCK)
    scale_K = blocks.abs().amax(1)
    levels = torch.tensor(LEVELS, device=weight.device)
    unit = (blocks * torch.where(scale_K > 0, 1 / scale_K, 0)[:, None]).flatten()
    codes_N = torch.bucketize(unit, (levels[1:] + levels[:-1]) / 2).to(torch.uint8)
    offset = scale_K.mean()
    scales, scale_max = bytes_of(scale_K - offset)
    return Nf4((codes_N[::2] << 4) | codes_N[1::2], scales, scale_max, offset)


def nf4_dense(packed: Nf4, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """The matrix in `dtype`."""
    device = packed.codes.device
    wide = native.nf4_dense(packed, (_levels(), code_book(device)), shape, dtype) if device.type == "cpu" else None
    return nf4_plain(packed, shape, dtype) if wide is None else wide


def nf4_plain(packed: Nf4, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """`nf4_dense` in torch."""
    codes_B, scale_K = packed.codes, nf4_scales(packed)
    out_N, table = torch.empty(2 * len(codes_B), dtype=dtype, device=codes_B.device), _pairs(codes_B.device)
    for start in () if codes_B.is_meta else range(0, len(codes_B), PIECE):
        two_B = table.index_select(0, codes_B[start : start + PIECE].int())
        piece = two_B.view(torch.float32).view(-1, BLOCK)
        block = slice(2 * start // BLOCK, 2 * start // BLOCK + len(piece))
        out_N[2 * start : 2 * (start + PIECE)].view(-1, BLOCK).copy_(piece.mul_(scale_K[block, None]))
    return out_N[: shape[0] * shape[1]].view(shape)


def nf4_scales(packed: Nf4) -> Tensor:
    """The block scales, fp32 [K]."""
    return packed.scales if packed.scales.is_floating_point() else bytes_dense(packed.scales, packed.scale_max) + packed.offset


def int8(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 [O, I] and scales fp32 [O]."""
    wide_OI = weight_OI.detach().float()
    scale_O = wide_OI.abs().amax(1) / 127
    return (wide_OI / torch.where(scale_O > 0, scale_O, 1)[:, None]).round().to(torch.int8), scale_O


def int8_dense(codes_OI: Tensor, scale_O: Tensor, dtype: torch.dtype) -> Tensor:
    """The matrix in `dtype`."""
    if (wide := native.int8_dense(codes_OI, scale_O, dtype)) is not None:
        return wide
    return torch.mul(codes_OI, scale_O[:, None], out=torch.empty(codes_OI.shape, dtype=dtype, device=codes_OI.device))


def fp8(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Codes e4m3 [O, I] and scales fp32 [O]: the largest of each row becomes the largest number of the format."""
    wide_OI = weight_OI.detach().float()
    scale_O = (wide_OI.abs().amax(1) / torch.finfo(torch.float8_e4m3fn).max).clamp_(min=torch.finfo(torch.float32).tiny)
    return (wide_OI / scale_O[:, None]).to(torch.float8_e4m3fn), scale_O


def fp8_product(x_TI: Tensor, codes_OI: Tensor, scale_O: Tensor) -> Tensor:
    """x W^T with both in 8 bits, x by its rows; the tensor cores add in fp32 (`torch._scaled_mm`)."""
    codes_TI, scale_T = fp8(x_TI)
    y_TO = torch._scaled_mm(codes_TI, codes_OI.t(), scale_a=scale_T[:, None], scale_b=scale_O[None], out_dtype=torch.bfloat16)
    return y_TO.to(x_TI.dtype)


def bytes_of(values_N: Tensor, *, signed: bool = True) -> tuple[Tensor, Tensor]:
    """Codes [N] uint8 of fp32 numbers, the nearest of the 8-bit book, and the largest magnitude of each block of 256."""
    blocks = F.pad(values_N, (0, -len(values_N) % SCALES)).view(-1, SCALES)
    largest = blocks.abs().amax(1)
    unit = (blocks / torch.where(largest > 0, largest, 1)[:, None]).flatten()[: len(values_N)]
    book = code_book(values_N.device, signed=signed)
    return torch.bucketize(unit, (book[1:] + book[:-1]) / 2).to(torch.uint8), largest


def bytes_dense(codes_N: Tensor, largest: Tensor, *, signed: bool = True) -> Tensor:
    """The numbers in fp32."""
    blocks = F.pad(code_book(codes_N.device, signed=signed)[codes_N.int()], (0, -len(codes_N) % SCALES)).view(-1, SCALES)
    return (blocks * largest[:, None]).flatten()[: len(codes_N)]


@cache
def code_book(device: torch.device, *, signed: bool = True) -> Tensor:
    """The dynamic 8-bit code book: 7 decades, each with twice the numbers of the one below (Dettmers et al., arXiv 2110.02861)."""
    positive = []
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (decade if signed else decade + 1) + 1)
        positive += (10.0 ** (decade - 6) * (edges[1:] + edges[:-1]) / 2).tolist()
    negative = [-value for value in positive] if signed else []
    return torch.tensor(sorted([*positive, *negative, 0.0, 1.0]), device=device)


@cache
def _levels() -> Tensor:
    return torch.tensor(LEVELS, device="cpu")


@cache
def _pairs(device: torch.device) -> Tensor:
    """For each byte its two levels, as one 64-bit number [256]."""
    levels, byte = torch.tensor(LEVELS), torch.arange(256)
    return torch.stack([levels[byte >> 4], levels[byte & 15]], 1).contiguous().view(torch.int64).flatten().to(device)
