"""Attention over pages against float64: slots that nobody may read are NaN, and table entries that nobody may follow lead to them."""

import random

import pytest
import torch
from cases import DEVICE, FLOATS, broken, draw

from garage.kernels import triton_paged

E4M3 = torch.float8_e4m3fn
SPLITS, TILE = triton_paged._splits, triton_paged._tile
LIMIT = {torch.float32: 3e-6, torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2}
STEPS = {  # rows and context of each request
    "decode": [(1, 1), (1, 17), (1, 40), (1, 5)],
    "prompt": [(35, 35)],
    "mixed": [(1, 33), (11, 11), (3, 19), (9, 50), (1, 2)],
    "small": [(1, 37), (10, 43)],
}


def held(x, dtype):
    return x.clamp(-448, 448).to(E4M3) if dtype == E4M3 else x.to(dtype)


def exact(q, k, v, window, scale):
    """The last rows of one request, in float64; k and v are its whole context."""
    q, k, v = (t.double() for t in (q, k, v))
    group = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    slot, position = torch.arange(len(k))[None], torch.arange(len(k) - len(q), len(k))[:, None]
    mask = ((slot <= position) & (slot > position - (window or 1 << 30))).to(q.device)
    score = torch.einsum("tnh,snh->nts", q, k) * scale
    return torch.einsum("nts,snh->tnh", score.masked_fill(~mask, -torch.inf).softmax(-1), v)


def check(kernels, step, dtype, *, heads=(4, 2), width=24, page=16, window=None, pool=None, splits=None):
    """Context that lies in pages already, then a step that writes its rows and attends."""
    pool, (num, kv), shuffle = pool or dtype, heads, random.Random(0)
    form = lambda *a: TILE(*a) | {"BLOCK_S": 16}  # noqa: E731
    kernels._splits, kernels._tile = (lambda programs: splits, form) if splits else (SPLITS, TILE)
    rows, contexts = zip(*STEPS[step], strict=True)
    pages = list(range(1 + sum(-(-context // page) for context in contexts)))
    shuffle.shuffle(pages)
    keys, values = (held(torch.full((len(pages) + 1, page, kv, width), torch.nan, device=DEVICE), pool) for _ in range(2))
    tables = torch.full((len(rows), max(contexts) // page + 2), len(pages), dtype=torch.int64)
    whole, news, slots = [], [], []
    for i, (count, context) in enumerate(STEPS[step]):
        k, v = (held(draw(context, kv, width, dtype=dtype, seed=seed + 10 * i), pool) for seed in (1, 2))
        first = max(0, context - count + 1 - window) // page if window else 0
        table = [pages.pop() for _ in range(-(-context // page))]
        tables[i, first : len(table)] = torch.tensor(table[first:])
        place = torch.tensor([table[p // page] * page + p % page for p in range(context)], device=DEVICE)
        seen = max(0, context - count + 1 - window) if window else 0
        for target, new in ((keys, k), (values, v)):
            target.view(-1, kv, width)[place[seen : context - count]] = new[seen : context - count]
        whole.append((k, v))
        news.append((k[context - count :], v[context - count :]))
        slots.append(place[context - count :])
    q, scale = draw(sum(rows), num, width, dtype=dtype, seed=99), 0.3
    k, v = (torch.cat(part).to(dtype) for part in zip(*news, strict=True))
    kernels.write(keys, values, torch.cat(slots), k, v)
    on_device = torch.tensor(contexts, device=DEVICE)
    out = kernels.attend(q, (keys, values), tables.to(DEVICE), on_device, rows, scale=scale, window=window)
    for ours, wanted, (k, v) in zip(out.split(rows), q.split(rows), whole, strict=True):
        right = exact(wanted, k.to(dtype), v.to(dtype), window, scale)
        off = (ours.double() - right).abs().max() / right.abs().max()
        assert off < LIMIT[dtype], f"off by {off:.2g}"


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("step", STEPS)
def test_each_dtype(step, dtype):
    check(triton_paged, step, dtype, splits=2 if step == "decode" else 1)


def test_as_many_splits_as_it_takes():
    """One request of one key/value head: all 32 splits, most of them empty."""
    check(triton_paged, "decode", torch.float16, heads=(2, 1))


@pytest.mark.parametrize("splits", [1, 2, 8])
@pytest.mark.parametrize("window", [None, 1, 7, 16])
def test_windows_and_splits(window, splits):
    check(triton_paged, "small", torch.float32, window=window, splits=splits, page=4)


@pytest.mark.parametrize("heads, width, page", [((5, 1), 16, 3), ((6, 2), 64, 16), ((17, 1), 8, 64), ((2, 2), 40, 1)])
def test_shapes(heads, width, page):
    check(triton_paged, "small", torch.float16, heads=heads, width=width, page=page, window=9, splits=2)


@pytest.mark.parametrize("dtype", FLOATS)
def test_pages_of_8_bits(dtype):
    check(triton_paged, "small", dtype, pool=E4M3, splits=2)


def test_every_number_of_8_bits():
    """All 256 codes there and back, and the rounding of numbers between, at and beyond them."""
    codes = torch.arange(256, dtype=torch.uint8).view(E4M3)
    exact = codes.float()[codes.float().isfinite()]
    middle = (exact.sort().values[1:] + exact.sort().values[:-1]) / 2
    edges = torch.tensor([1e-9, -500.0, 1e30, torch.nan])
    numbers = torch.cat([edges, exact, middle, middle * (1 + 1e-6), draw(400, scale=0.02).cpu()])
    numbers = numbers[: len(numbers) // 32 * 32].view(-1, 1, 32).to(DEVICE)
    keys, values = (torch.zeros(len(numbers), 1, 1, 32, dtype=torch.uint8, device=DEVICE).view(E4M3) for _ in range(2))
    triton_paged.write(keys, values, torch.arange(len(numbers), device=DEVICE), numbers, numbers)
    theirs = numbers.clamp(-448, 448).to(E4M3)
    same = keys.view(torch.uint8).flatten() == theirs.view(torch.uint8).flatten()
    assert bool((same | theirs.float().isnan().flatten()).all()) and keys.float().isnan().sum() == numbers.isnan().sum()
    assert torch.equal(keys.view(torch.uint8), values.view(torch.uint8))
    assert theirs.float().isnan().any() and len(exact) == 254


@pytest.mark.parametrize(
    "old, new",
    [
        ("position[:, None] - window)", "position[:, None] - window - 1)"),
        ("tl.maximum(oldest + 1 - window, 0)", "tl.maximum(oldest + 2 - window, 0)"),
        ("tl.exp2(sums - tl.max(sums, 0))", "tl.where(sums > -1e30, 1.0, 0.0)"),
        ("mixed * keep[:, None]", "mixed"),
        ("tl.load(starts_ptr + request) + first + row // GROUP", "tl.load(starts_ptr + request) + first + row % ROWS"),
        ("slot % PAGE)", "slot % PAGE + 1)"),
        ("slot[None, :] <= position[:, None]", "slot[None, :] < context"),
        ("is_seen, 0).to(tl.int64)", "is_seen, 0).to(tl.int64) * 0"),
        ("request * table_stride", "request * 0"),
        ("(wide == wide", "(wide != wide"),
        ("* 256.0", "* 128.0"),
        ("(weight > 0)[:, None]", "(weight >= 0)[:, None]"),
    ],
)
def test_broken_attention_is_caught(tmp_path, old, new):
    kernels = broken(tmp_path, "triton_paged", old, new)
    with pytest.raises((AssertionError, IndexError)):
        check(kernels, "small", torch.float32, window=21, splits=8, page=4)
        check(kernels, "small", torch.float32, pool=E4M3, splits=1)
