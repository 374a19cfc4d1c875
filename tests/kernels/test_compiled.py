"""The compiled ops of answering against their definitions in float64; odd sizes, threads, pages full of NaN; a wrong one is seen."""

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from garage.kernels import compiled, dispatch, native, reference, tiles
from garage.kernels.paths import plainly

pytestmark = pytest.mark.skipif(compiled._typed("serve") is None, reason="nothing is compiled here")
needs_products = pytest.mark.skipif(not compiled.has_products(), reason="this processor has no AVX-512 with BF16 and VNNI")
BOTH = [(torch.float32, 3e-6), (torch.bfloat16, 2e-2)]
FORMS = [(0.0, True), (1.0, False)]


@pytest.fixture(autouse=True)
def _answering() -> Iterator[None]:
    with torch.inference_mode():
        yield


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def off(got: torch.Tensor | None, wanted: torch.Tensor) -> float:
    assert got is not None and got.shape == wanted.shape and bool(got.isfinite().all())
    return float((got.double() - wanted.double()).abs().max() / wanted.abs().max().clamp(min=1))


@pytest.mark.parametrize("dtype, tolerance", BOTH)
@pytest.mark.parametrize("offset, rounds_first", FORMS)
@pytest.mark.parametrize("shape", [(1, 16), (7, 576), (300, 640)])
def test_rms_norm(dtype, tolerance, offset, rounds_first, shape) -> None:
    x, weight = draw(*shape, dtype=dtype), draw(shape[-1], dtype=dtype, seed=1)
    wanted = reference.rms_norm(x.double(), weight.double(), eps=1e-6, offset=offset, rounds_first=rounds_first)
    assert off(compiled.rms_norm(x, weight, 1e-6, offset, rounds_first), wanted) < tolerance
    assert off(compiled.rms_norm(x, weight, 1e-6, 1.0 - offset, rounds_first), wanted) > 0.1


@pytest.mark.parametrize("dtype, tolerance", BOTH)
@pytest.mark.parametrize("offset, rounds_first", FORMS)
@pytest.mark.parametrize("tokens, heads, width", [(1, 3, 32), (5, 9, 64), (40, 2, 256)])
def test_norm_rotate_of_heads_that_lie_apart(dtype, tolerance, offset, rounds_first, tokens, heads, width) -> None:
    x, weight = draw(tokens, heads + 2, width, dtype=dtype)[:, 1:-1], draw(width, dtype=dtype, seed=1)
    angle = draw(tokens, width // 2, seed=2)
    angles = angle.cos().to(dtype), angle.sin().to(dtype)
    normal = reference.rms_norm(x.double(), weight.double(), eps=1e-6, offset=offset, rounds_first=rounds_first)
    wanted = reference.rotate(normal, *(part.double() for part in angles))
    assert off(compiled.norm_rotate(x, weight, angles, 1e-6, offset, rounds_first), wanted) < tolerance
    assert off(compiled.norm_rotate(x, weight, angles[::-1], 1e-6, offset, rounds_first), wanted) > 0.1


@pytest.mark.parametrize("dtype, tolerance", BOTH)
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gated_of_halves_of_one_tensor(dtype, tolerance, activation) -> None:
    both = draw(37, 2 * 704, dtype=dtype) * 4
    both[0, :4] = torch.tensor([1e4, -1e4, 200.0, -200.0])
    gate, up = both.chunk(2, -1)
    wanted = reference.gated(gate.double(), up.double(), activation=activation)
    assert off(compiled.gated(gate, up, activation), wanted) < tolerance
    assert off(compiled.gated(up, gate, activation), wanted) > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 15, 16, 1024, 1025, 5003])
def test_best(dtype, width) -> None:
    x = draw(12, width, dtype=dtype)
    x[1], x[2, width // 2], x[3] = -torch.inf, torch.inf, 1.0
    x[4, width // 3], x[5, -1], x[6, width // 2 :] = torch.nan, -torch.tensor(torch.nan), 1e9
    x[7] = x[7].abs().neg()
    assert compiled.best(x).tolist() == x.float().numpy().argmax(1).tolist()
    wide = torch.cat([x, torch.full((12, 5), 1e30, dtype=dtype)], 1)
    assert compiled.best(wide[:, :width]).tolist() == x.float().numpy().argmax(1).tolist()
    assert compiled.best(wide).tolist() != x.float().numpy().argmax(1).tolist()


ROWS, CONTEXTS = (1, 5, 1, 40, 1, 1, 2, 1, 1), (1, 30, 77, 40, 130, 16, 90, 17, 33)


def pages(dtype, heads, width, page):
    """Keys and values of nine requests in pages in disorder; every other slot is NaN."""
    counts = [-(-context // page) for context in CONTEXTS]
    order, start = torch.randperm(sum(counts) + 3, generator=torch.Generator().manual_seed(1)), 0
    tables = torch.zeros(len(counts), max(counts), dtype=torch.int64)
    pools = tuple(torch.full((len(order), page, heads, width), torch.nan, dtype=dtype) for _ in range(2))
    for b, (count, context) in enumerate(zip(counts, CONTEXTS, strict=True)):
        tables[b, :count] = order[start : start + count]
        places = torch.arange(context)
        slots = tables[b, places // page] * page + places % page
        k, v = (draw(context, 2, heads, width, dtype=dtype, seed=10 * b + i)[:, 0] for i in range(2))
        compiled.write(*pools, slots, k, v)
        start += count
    return pools, tables


def attention_off(dtype, shape, page, window, tell=None) -> float:
    heads, kv_heads, width = shape
    pools, tables = pages(dtype, kv_heads, width, page)
    q = draw(sum(ROWS), heads + 1, width, dtype=dtype, seed=5)[:, :heads]
    got = compiled.attend(q, pools, tables, torch.tensor(CONTEXTS), ROWS, scale=0.2, window=tell or window)
    worst, first = 0.0, 0
    for b, (rows, context) in enumerate(zip(ROWS, CONTEXTS, strict=True)):
        places, own = torch.arange(context), torch.arange(context - rows, context)[:, None]
        k, v = (pool[tables[b, places // page], places % page].double() for pool in pools)
        visible = (places <= own) & (places > own - (window or context))
        wanted = reference.attention(q[first : first + rows].double(), k, v, visible, 0.2)
        worst, first = max(worst, off(got[first : first + rows], wanted)), first + rows
    return worst


@pytest.mark.parametrize("dtype, tolerance", BOTH)
@pytest.mark.parametrize("shape, page, window", [((9, 3, 64), 16, None), ((4, 1, 256), 16, 20), ((2, 2, 16), 3, None), ((4, 2, 48), 1, 7)])
def test_attention_over_pages(dtype, tolerance, shape, page, window) -> None:
    assert attention_off(dtype, shape, page, window) < tolerance
    if window is not None:
        assert attention_off(dtype, shape, page, window, tell=window + 1) > 1e-2, "a window that is off must show"


@needs_products
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8, 9, 17, 40])
@pytest.mark.parametrize("outputs, width", [(1, 2), (48, 64), (37, 50), (100, 576), (1030, 98)])
def test_products(rows, outputs, width) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        x, weight = draw(rows, width, dtype=dtype), draw(outputs, width, dtype=dtype, seed=1)
        for bits in ("bf16", "int8", "int4"):
            if bits == "bf16" and dtype == torch.float32:
                continue
            made, shape = tiles.tiled(weight, bits), (outputs, width)
            matrix = tiles.dense(made, shape, torch.float32)
            scale = x.float().abs().amax(1, keepdim=True) / 127
            seen = x if bits == "bf16" else (x.float() / scale).round() * scale
            wanted = seen.double() @ matrix.double().T
            assert off(tiles.product(x, made, shape), wanted) < (1e-2 if dtype == torch.bfloat16 else 4e-3)
            with plainly():
                assert off(tiles.product(x, made, shape), x.double() @ matrix.double().T) < 2e-2
            turned = tiles.product(x, made._replace(codes=made.codes.flip(2)), shape)
            assert outputs < 30 or off(turned, wanted) > 0.1, "outputs in another order must show"


@needs_products
@pytest.mark.parametrize("bits", ["bf16", "int8", "int4"])
def test_a_row_alone_gets_what_it_gets_in_a_batch(bits) -> None:
    x, made = draw(40, 576, dtype=torch.bfloat16), tiles.tiled(draw(100, 576, dtype=torch.bfloat16, seed=1), bits)
    whole = tiles.product(x, made, (100, 576))
    for rows in (1, 2, 3, 4, 5, 8):
        assert torch.equal(tiles.product(x[:rows], made, (100, 576)), whole[:rows])


@needs_products
def test_threads_change_nothing() -> None:
    """With one or two the requests are enough for all heads at once, with three they are not."""
    x, weight = draw(33, 576, dtype=torch.bfloat16), draw(1000, 576, dtype=torch.bfloat16, seed=1)
    pools, tables = pages(torch.bfloat16, 2, 32, 16)
    q = draw(sum(ROWS), 4, 32, dtype=torch.bfloat16)
    outs, before = [], torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        products = [tiles.product(x, tiles.tiled(weight, bits), (1000, 576)) for bits in ("bf16", "int8", "int4")]
        outs.append([*products, compiled.attend(q, pools, tables, torch.tensor(CONTEXTS), ROWS, scale=0.2, window=None)])
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in outs[1:] for a, b in zip(outs[0], other, strict=True))


def test_tiles_hold_what_they_were_made_of() -> None:
    weight = draw(50, 96, dtype=torch.bfloat16)
    shape = (50, 96)
    assert torch.equal(tiles.dense(tiles.tiled(weight, "bf16"), shape, torch.bfloat16), weight)
    errors = {}
    for bits in ("int8", "int4"):
        made = tiles.tiled(weight, bits)
        full = tiles.dense(made, shape, torch.float32)
        errors[bits] = float((full - weight.float()).norm() / weight.float().norm())
        rows = torch.tensor([3, 49, 0])
        assert torch.equal(tiles.dense(made, shape, torch.float32, rows), full[rows])
    assert errors["int8"] < 0.01 and 0.02 < errors["int4"] < 0.11
    parts = [tiles.tiled(weight[:32], "int4"), tiles.tiled(weight[32:], "int4")]
    assert all(torch.equal(a, b) for a, b in zip(tiles.joined(parts), tiles.tiled(weight, "int4"), strict=True))
    assert (tiles.dense(tiles.tiled(torch.zeros(3, 32), "int4"), (3, 32), torch.float32) == 0).all()


def test_torch_does_it_where_nothing_is_compiled() -> None:
    x, weight = draw(3, 32, dtype=torch.bfloat16), draw(32, dtype=torch.bfloat16)
    with plainly():
        assert compiled.rms_norm(x, weight, 1e-6, 0.0, True) is None
    assert compiled.rms_norm(x.double(), weight.double(), 1e-6, 0.0, True) is None
    assert compiled.rms_norm(x[:, :9], weight[:9], 1e-6, 0.0, True) is None
    with torch.inference_mode(False):
        assert compiled.rms_norm(x.clone(), weight.clone(), 1e-6, 0.0, True) is None
    assert dispatch.rms_norm(x[:, :9], weight[:9], eps=1e-6, offset=0.0, rounds_first=True).shape == (3, 9)


@pytest.mark.parametrize("right, wrong", [("largest(score[r])", "score[r][0] * 0.0f + 3e38f"), ("b * c + a * s", "b * c - a * s"),
                                          ("-1.59576912f", "-1.7f")], ids=["softmax", "rotation", "gelu"])  # fmt: skip
def test_a_wrong_loop_is_seen(right, wrong, tmp_path: Path, monkeypatch) -> None:
    text = native.SERVE.read_text()
    assert text.count(right) == 1
    source = tmp_path / "twin.cpp"
    source.write_text(text.replace(right, wrong))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with answering_with(native.compiled(source)), pytest.raises(AssertionError):
        some_of_all(torch.float32, 3e-6)


@pytest.mark.parametrize("processor", ["x86-64", "x86-64-v3", "skylake-avx512"])
@pytest.mark.parametrize("dtype, tolerance", BOTH)
def test_processors_that_have_less(processor, dtype, tolerance) -> None:
    """No product of bfloat16, no register of 512 bits, no fused product and sum."""
    needed, here = {"x86-64-v3": "avx2", "skylake-avx512": "avx512"}.get(processor, ""), torch.backends.cpu.get_cpu_capability().lower()
    if platform.machine() != "x86_64" or not (here.startswith(needed) or here == "avx512"):
        pytest.skip(f"this processor is no {processor}")
    with answering_with(native.compiled(native.SERVE, ((f"-march={processor}", "-fopenmp"),))):
        some_of_all(dtype, tolerance)


@contextmanager
def answering_with(library: Path) -> Iterator[None]:
    """Another library in the place of the one that was compiled for this processor."""
    compiled._typed.cache_clear()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(native, "loops_here", lambda source: ctypes.CDLL(str(library)))
            yield
    finally:
        compiled._typed.cache_clear()


def some_of_all(dtype: torch.dtype, tolerance: float) -> None:
    test_attention_over_pages(dtype, tolerance, (4, 1, 32), 16, None)
    test_norm_rotate_of_heads_that_lie_apart(dtype, tolerance, 0.0, True, 5, 3, 64)
    test_gated_of_halves_of_one_tensor(dtype, tolerance, "gelu_tanh")
    test_rms_norm(dtype, tolerance, 1.0, False, (3, 640))
