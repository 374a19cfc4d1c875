"""Frozen matrices as the CPU's vector instructions want them: bf16, 8 bits or 4, in blocks of 16 outputs (`native/product.cpp`).

- bf16: the same numbers in another order; the width is even.
- int8: codes of 8 bits and one scale for each output, as `quant.int8`.
- int4: codes of 4 bits; a weight is scale of its output * factor of its 32 inputs * (code - 8), the factor a whole number from 1 to 16.
  So it is an 8-bit weight exactly, and one product serves both: 4.25 bits a weight. Of the factors near the largest magnitude, the
  one with the smallest squared error is taken.

Products of narrow tiles round each row of x to 8 bits (dynamic quantisation). Where nothing is compiled, the matrix is widened.

Shape suffixes: O outputs, I inputs, X blocks of 16 outputs, K steps of 2 (bf16) or 4 inputs, G groups of 32 inputs.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from garage.kernels import compiled

LANES, GROUP = 16, 32
PIECE = 1 << 19  # numbers quantised at once: what lies between the steps stays in the cache
Bits = Literal["bf16", "int8", "int4"]


class Tiles(NamedTuple):
    """The codes [X, K, 16, 2 or 4] (int4: two steps in a byte), factors uint8 [X, G, 16] (int4), scales fp32 [16 X] and 128 times
    the sums of the codes, int32 [16 X] (int8 and int4); the others are empty."""

    codes: Tensor
    factors: Tensor
    scales: Tensor
    sums: Tensor


def tiled(weight_OI: Tensor, bits: Bits) -> Tiles:
    """Lay out a matrix, rounded if need be; of one without numbers, what its tiles take."""
    if bits == "bf16" and not weight_OI.is_meta:
        return Tiles(_blocks(weight_OI.detach(), 2), *[torch.empty(0)] * 3)
    # The parts get their places before they are made: lying between what is freed, they would leave holes as large as they are.
    whole, step = _blank(weight_OI, bits), max(1, PIECE // weight_OI.shape[1] // LANES)
    for number, rows_OI in enumerate(torch.split(weight_OI.detach(), step * LANES) if not weight_OI.is_meta else ()):
        for into, part in zip(whole, _narrow(rows_OI, bits), strict=True):
            into[number * step * len(into) // len(whole.codes) :][: len(part)] = part
    return whole


def joined(parts: list[Tiles]) -> Tiles:
    """Matrices of one width on top of each other; all but the last have whole blocks."""
    return Tiles(*(torch.cat(same) for same in zip(*parts, strict=True)))


def dense(tiles: Tiles, shape: tuple[int, int], dtype: torch.dtype, rows: slice | Tensor = slice(None)) -> Tensor:
    """The matrix, or some of its rows, in `dtype`."""
    codes_XKLS = tiles.codes if not len(tiles.factors) else _widened(tiles)
    if isinstance(rows, Tensor):
        out = codes_XKLS[rows // LANES, :, rows % LANES].flatten(1)
    else:
        out = codes_XKLS.transpose(1, 2).reshape(codes_XKLS.shape[0] * LANES, -1)[: shape[0]][rows]
    return out[:, : shape[1]].to(dtype) if not len(tiles.scales) else (out[:, : shape[1]] * tiles.scales[: shape[0]][rows, None]).to(dtype)


def product(x_TI: Tensor, tiles: Tiles, shape: tuple[int, int]) -> Tensor:
    """x W^T in the dtype of x."""
    y_TO = compiled.product(x_TI, tiles, shape[0])
    return F.linear(x_TI, dense(tiles, shape, x_TI.dtype)) if y_TO is None else y_TO


def _narrow(weight_OI: Tensor, bits: Bits) -> Tiles:
    wide_OI = F.pad(weight_OI.float(), (0, -weight_OI.shape[1] % GROUP, 0, -len(weight_OI) % LANES))
    top_O = wide_OI.abs().amax(1)
    scale_O = torch.where(top_O > 0, top_O, 1) / (127 if bits == "int8" else 120)
    unit_OI = wide_OI / scale_O[:, None]
    if bits == "int8":
        codes_OI = unit_OI.round().to(torch.int8)
        return Tiles(_blocks(codes_OI, 4), torch.empty(0), scale_O, codes_OI.sum(1, dtype=torch.int32) * 128)
    codes_OGI, factors_OG = _int4(unit_OI.view(len(unit_OI), -1, GROUP))
    sums_O = ((codes_OGI.float() - 8) * factors_OG[..., None]).sum((1, 2)).to(torch.int32) * 128
    steps = _blocks(codes_OGI.flatten(1).to(torch.uint8), 4)
    factors_XGL = factors_OG.to(torch.uint8).view(-1, LANES, factors_OG.shape[1]).transpose(1, 2).contiguous()
    return Tiles(steps[:, ::2] | steps[:, 1::2] << 4, factors_XGL, scale_O, sums_O)


def _blank(weight_OI: Tensor, bits: Bits) -> Tiles:
    """Tiles of the right sizes with nothing in them."""
    (rows, width), none, like = weight_OI.shape, torch.empty(0), weight_OI.new_empty
    blocks, groups = -(-rows // LANES), -(-width // GROUP)
    if bits == "bf16":
        return Tiles(like(blocks, width // 2, LANES, 2), none, none, none)
    codes = like(blocks, groups * (4 if bits == "int4" else 8), LANES, 4, dtype=torch.uint8 if bits == "int4" else torch.int8)
    factors = like(blocks, groups, LANES, dtype=torch.uint8) if bits == "int4" else none
    return Tiles(codes, factors, like(blocks * LANES, dtype=torch.float32), like(blocks * LANES, dtype=torch.int32))


def _int4(unit_OGI: Tensor) -> tuple[Tensor, Tensor]:
    """Codes 0 to 15 and factors 1 to 16 of groups whose numbers are at most 120."""
    near_OG1 = unit_OGI.abs().amax(2, keepdim=True) / 7.5
    best, codes, factors = torch.full_like(near_OG1, torch.inf), torch.empty_like(unit_OGI), torch.empty_like(near_OG1)
    for step in (-1, 0, 1):
        factor = (near_OG1.ceil() + step).clamp_(1, 16)
        code = (unit_OGI / factor).round_().clamp_(-8, 7)
        error = torch.addcmul(unit_OGI, code, factor, value=-1).square_().sum(2, keepdim=True)
        is_better = error < best
        best, factors = torch.where(is_better, error, best), torch.where(is_better, factor, factors)
        codes = torch.where(is_better, code, codes)
    return codes.add_(8), factors[..., 0]


def _blocks(codes_OI: Tensor, step: int) -> Tensor:
    missing = -len(codes_OI) % LANES
    padded_OI = F.pad(codes_OI, (0, 0, 0, missing)) if missing else codes_OI  # it would copy
    return padded_OI.reshape(-1, LANES, codes_OI.shape[1] // step, step).transpose(1, 2).contiguous()


def _widened(tiles: Tiles) -> Tensor:
    """The 8-bit codes of 4-bit tiles."""
    both = torch.stack([tiles.codes & 15, tiles.codes >> 4], 2).flatten(1, 2).to(torch.int8) - 8
    factors = tiles.factors.to(torch.int8).repeat_interleave(GROUP // 4, 1)
    return both * factors[..., None]
