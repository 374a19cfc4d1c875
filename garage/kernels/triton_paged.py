"""`paged.py` in Triton: attention over pages by split context (Dao et al., Flash-Decoding), for decoding and for prompts alike.

A step is cut into tiles: the rows of a tile's dot are the queries of a few tokens of one request and of the heads that share a key/value
head. The keys that a tile can see, from the first in its window on, are cut into parts, so that few tiles still fill the GPU; parts are
joined by their logarithms of sums. Tables and lengths are read on the device, so a launch can be captured in a graph and replayed.

Nothing outside a request's own visible slots is read, so pages need no zeroing, and table entries behind a window may hold anything.
Keys and values may be held as e4m3 numbers with scale 1, cut off beyond 448; where the GPU cannot read them (before sm_90), they are bytes.

Limits: slow without tensor cores for 16-bit floats (before sm_80).

Shape suffixes: T tokens of the step, B requests, P pages of one request, X tiles, N query heads, M key/value heads, W both, H head width.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

FEW, MANY = 16, 64  # rows of a dot, at least: of a decoding request, of a prompt
PROGRAMS = 264  # two for each multiprocessor of an H200
MOST_SPLITS = 32


@triton.jit
def _wide(codes, LIKE: tl.constexpr):
    """Any numbers in another dtype; bytes are e4m3: an fp16 has the same fields after a shift, and 2^-8 of the number."""
    if codes.dtype == tl.uint8:
        bits = ((codes & 0x80).to(tl.uint16) << 8) | ((codes & 0x7F).to(tl.uint16) << 7)
        number = bits.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
        return tl.where((codes & 0x7F) == 0x7F, float("nan"), number).to(LIKE)
    return codes.to(LIKE)


@triton.jit
def _narrow(x, LIKE: tl.constexpr):
    """As the pool holds it: bytes are the nearest e4m3, even at ties."""
    if LIKE == tl.uint8:  # noqa: SIM300
        wide = x.to(tl.float32)
        bits = wide.to(tl.uint32, bitcast=True)
        size = tl.minimum(tl.abs(wide), 448.0)
        tiny = (size + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000  # in steps of 2^-9, rounded by the addition
        normal = size.to(tl.uint32, bitcast=True)
        normal = ((normal + 0x7FFFF + ((normal >> 20) & 1)) >> 20) - (120 << 3)
        code = tl.where(wide == wide, tl.where(size < 0.015625, tiny, normal), 0x7F)
        return (code | ((bits >> 24) & 0x80)).to(tl.uint8)
    return x.to(LIKE)


@triton.jit
def _write(k_ptr, v_ptr, keys_ptr, values_ptr, slots_ptr, k_stride, v_stride, width, BLOCK: tl.constexpr):
    token, column = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    at = tl.load(slots_ptr + token) * width + column
    k = tl.load(k_ptr + token * k_stride + column, column < width, 0.0)
    v = tl.load(v_ptr + token * v_stride + column, column < width, 0.0)
    tl.store(keys_ptr + at, _narrow(k, keys_ptr.dtype.element_ty), column < width)
    tl.store(values_ptr + at, _narrow(v, values_ptr.dtype.element_ty), column < width)


@triton.jit
def _attend(
    q_ptr, keys_ptr, values_ptr, table_ptr, starts_ptr, contexts_ptr, tiles_ptr, out_ptr, parts_ptr, sums_ptr, table_stride, scale, window,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD: tl.constexpr, PAGE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_S: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    tile, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    request, first = tl.load(tiles_ptr + 2 * tile), tl.load(tiles_ptr + 2 * tile + 1)
    stop, context = tl.load(starts_ptr + request + 1), tl.load(contexts_ptr + request).to(tl.int32)
    row, column = tl.arange(0, ROWS), tl.arange(0, BLOCK_H)
    token = tl.load(starts_ptr + request) + first + row // GROUP
    position = context - stop + token
    is_row = (row < ROWS // GROUP * GROUP) & (token < stop)
    at = (token.to(tl.int64) * HEADS + kv_head * GROUP + row % GROUP)[:, None] * HEAD + column[None, :]
    q = tl.load(q_ptr + at, is_row[:, None] & (column < HEAD)[None, :], 0.0)
    oldest = context - stop + tl.load(starts_ptr + request) + first
    low, high = tl.maximum(oldest + 1 - window, 0), tl.minimum(context, oldest + ROWS // GROUP)
    share = tl.cdiv(tl.cdiv(high, BLOCK_S) - low // BLOCK_S, SPLITS)
    begin = (low // BLOCK_S + split * share) * BLOCK_S
    top, total = tl.full((ROWS,), float("-inf"), tl.float32), tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, BLOCK_H), tl.float32)
    for start in range(begin, tl.minimum(begin + share * BLOCK_S, high), BLOCK_S):
        slot = start + tl.arange(0, BLOCK_S)
        is_seen = (slot >= low) & (slot < high)
        page = tl.load(table_ptr + request * table_stride + slot // PAGE, is_seen, 0).to(tl.int64)
        place = ((page * PAGE + slot % PAGE) * (HEADS // GROUP) + kv_head) * HEAD
        k = tl.load(keys_ptr + place[None, :] + column[:, None], is_seen[None, :] & (column < HEAD)[:, None], 0.0)
        score = tl.dot(q, _wide(k, q.dtype), input_precision="ieee") * (scale * 1.4426950408889634)
        is_visible = (slot[None, :] <= position[:, None]) & (slot[None, :] > position[:, None] - window) & is_seen[None, :]
        score = tl.where(is_visible, score, float("-inf"))
        higher = tl.maximum(top, tl.max(score, 1))
        base = tl.where(higher > float("-inf"), higher, 0.0)
        weight, keep = tl.exp2(score - base[:, None]), tl.exp2(top - base)
        v = tl.load(values_ptr + place[:, None] + column[None, :], is_seen[:, None] & (column < HEAD)[None, :], 0.0)
        mixed = tl.dot(weight.to(q.dtype), _wide(v, q.dtype), mixed * keep[:, None], input_precision="ieee")
        total, top = total * keep + tl.sum(weight, 1), higher
    if SPLITS == 1:
        tl.store(out_ptr + at, mixed / total[:, None], is_row[:, None] & (column < HEAD)[None, :])
    else:
        part = ((tile * (HEADS // GROUP) + kv_head) * SPLITS + split).to(tl.int64) * ROWS + row
        tl.store(sums_ptr + part, top + tl.log2(total))
        tl.store(parts_ptr + part[:, None] * BLOCK_H + column[None, :], mixed / total[:, None])


@triton.jit
def _join(
    parts_ptr, sums_ptr, starts_ptr, tiles_ptr, out_ptr,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD: tl.constexpr, ROWS: tl.constexpr, BLOCK_H: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    tile, kv_head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    request = tl.load(tiles_ptr + 2 * tile)
    token = tl.load(starts_ptr + request) + tl.load(tiles_ptr + 2 * tile + 1) + row // GROUP
    column, split = tl.arange(0, BLOCK_H), tl.arange(0, SPLITS)
    part = ((tile * (HEADS // GROUP) + kv_head) * SPLITS + split).to(tl.int64) * ROWS + row
    sums = tl.load(sums_ptr + part)
    weight = tl.exp2(sums - tl.max(sums, 0))
    parts = tl.load(parts_ptr + part[:, None] * BLOCK_H + column[None, :], (weight > 0)[:, None], 0.0)
    mixed = tl.sum(parts * weight[:, None], 0) / tl.sum(weight, 0)
    at = (token.to(tl.int64) * HEADS + kv_head * GROUP + row % GROUP) * HEAD + column
    tl.store(out_ptr + at, mixed, (column < HEAD) & (token < tl.load(starts_ptr + request + 1)))


@dataclass(frozen=True)
class Step:
    """Where the rows of each request begin, int32 [B + 1]; and tiles (request, its first row) by the rows of their dot, int32 [X, 2]."""

    starts_B: Tensor
    tiles: dict[int, Tensor]


@lru_cache(16)
def plan(rows: tuple[int, ...], group: int, item: int, device: torch.device) -> Step:
    """The tiles of requests with so many rows each, `group` query heads to a key/value head; wide numbers leave no room for many rows."""
    few = max(FEW, triton.next_power_of_2(group))
    many = max(few, MANY) if item < 4 else few
    tiles: dict[int, list[tuple[int, int]]] = {}
    for request, count in enumerate(rows):
        size = few if count * group <= few else many
        tiles.setdefault(size, []).extend((request, first) for first in range(0, count, size // group))
    starts = torch.tensor(list(accumulate(rows, initial=0)), dtype=torch.int32, device=device)
    return Step(starts, {size: torch.tensor(found, dtype=torch.int32, device=device) for size, found in tiles.items()})


def write(keys: Tensor, values: Tensor, slots_T: Tensor, k_TMH: Tensor, v_TMH: Tensor) -> None:
    """Put this step's keys and values into their slots (page * page size + offset)."""
    (k_TW, v_TW), width = (part.flatten(1) for part in (k_TMH, v_TMH)), k_TMH[0].numel()
    assert k_TW.stride(1) == v_TW.stride(1) == 1, (k_TW.stride(), v_TW.stride())
    pools = (_held(keys, is_read=False), _held(values, is_read=False))
    sizes = (k_TW.stride(0), v_TW.stride(0), width)
    _write[(len(slots_T),)](k_TW, v_TW, *pools, slots_T, *sizes, BLOCK=triton.next_power_of_2(width))


def attend(
    q_TNH: Tensor, pools: tuple[Tensor, Tensor], tables_BP: Tensor, contexts_B: Tensor, rows: tuple[int, ...],
    *, scale: float, window: int | None,
) -> Tensor:  # fmt: skip
    """The mix for every row; `rows` of each request, the last of its `contexts_B` tokens."""
    q_TNH, (_, page_size, kv_heads, width), heads = q_TNH.contiguous(), pools[0].shape, q_TNH.shape[1]
    step, out_TNH = plan(rows, heads // kv_heads, q_TNH.element_size(), q_TNH.device), torch.empty_like(q_TNH)
    block_h = max(16, triton.next_power_of_2(width))
    shape = {"HEADS": heads, "GROUP": heads // kv_heads, "HEAD": width, "BLOCK_H": block_h}
    pages = (_held(pools[0]), _held(pools[1]), tables_BP, step.starts_B, contexts_B)
    for size, tiles in step.tiles.items():
        form = shape | {"ROWS": size, "SPLITS": _splits(len(tiles) * kv_heads)}
        grid, tile = (len(tiles), kv_heads, form["SPLITS"]), _tile(block_h, q_TNH.element_size())
        count = len(tiles) * kv_heads * form["SPLITS"] * size if form["SPLITS"] > 1 else 0
        parts, sums = (torch.empty(count * each, dtype=torch.float32, device=q_TNH.device) for each in (block_h, 1))
        numbers = (tables_BP.stride(0), scale, window or 1 << 30)
        _attend[grid](q_TNH, *pages, tiles, out_TNH, parts, sums, *numbers, PAGE=page_size, **form, **tile)
        if form["SPLITS"] > 1:
            queries = min(size // shape["GROUP"], max(rows)) * shape["GROUP"]
            _join[(len(tiles), kv_heads, queries)](parts, sums, step.starts_B, tiles, out_TNH, **form)
    return out_TNH


def _splits(programs: int) -> int:
    return min(MOST_SPLITS, 1 << max(0, (PROGRAMS // programs).bit_length() - 1))


def _tile(block_h: int, item: int) -> dict[str, int]:
    """Keys of a block, 16 KB of them, but no fewer than the dot needs; with 8 warps no generation of GPUs spills."""
    return {"BLOCK_S": min(64, max(16, 16384 // (block_h * item))), "num_warps": 8, "num_stages": 2}


def _held(pool: Tensor, *, is_read: bool = True) -> Tensor:
    if pool.dtype != torch.float8_e4m3fn or (is_read and reads_e4m3(pool.device)):
        return pool
    return pool.view(torch.uint8)


def reads_e4m3(device: torch.device) -> bool:
    """Whether the GPU converts e4m3 to every float itself."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
