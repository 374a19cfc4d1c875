"""NF4 and int8: error bounds, sizes, odd shapes, and bitsandbytes' codes."""

import pytest
import torch

from garage.kernels import quant


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.05


def back(weight: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return quant.nf4_dense(quant.nf4(weight), tuple(weight.shape), dtype)


def test_the_error_is_what_sixteen_levels_allow() -> None:
    weight = normal(512, 512)
    error, largest = (back(weight) - weight).view(-1, 64), weight.view(-1, 64).abs().amax(1, keepdim=True)
    assert (error.abs() / largest).max() < 0.16, "half the widest gap between levels, and a little for the scale's own rounding"
    assert (error.norm() / weight.norm()).item() == pytest.approx(0.092, abs=0.002)
    coarse = torch.round(weight / weight.abs().amax() * 7) / 7 * weight.abs().amax()
    assert (coarse - weight).norm() > 1.5 * error.norm(), "one scale for all and even levels are worse"


def test_bits_a_weight() -> None:
    packed = quant.nf4(normal(1024, 1024))
    assert 8 * sum(part.nbytes for part in packed) / 1024**2 == pytest.approx(4.127, abs=1e-3)


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (64, 64), (7, 96), (130, 33), (4097, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_shape_comes_back(shape, dtype) -> None:
    weight = normal(*shape).to(dtype)
    out = back(weight, dtype)
    assert out.shape == weight.shape and out.dtype == dtype and out.isfinite().all()
    assert (out.float() - weight.float()).abs().max() <= 0.17 * weight.float().abs().max()


@pytest.mark.parametrize("value", [0.0, 1.0, -1.0, 1e-30, -3e4])
def test_constant_matrices(value: float) -> None:
    weight = torch.full((8, 64), value)
    assert torch.allclose(back(weight), weight, rtol=1e-2, atol=1e-32)


def test_the_codes_are_bitsandbytes() -> None:
    theirs = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    for shape in ((64, 128), (96, 192), (768, 576)):
        weight = normal(*shape, seed=1)
        codes, state = theirs.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
        ours = quant.nf4(weight)
        assert torch.equal(codes.flatten(), ours.codes) and torch.equal(state.state2.code, quant.code_book(weight.device))
        assert torch.equal(state.state2.absmax, ours.scale_max) and torch.equal(state.offset, ours.offset)
        scales = state.state2.code[state.absmax.int()] - state.state2.code[ours.scales.int()]
        assert (state.absmax == ours.scales).float().mean() > 0.995 and scales.abs().max() < 0.015, "theirs are not always the nearest"
        same = ours._replace(scales=state.absmax)
        assert torch.equal(quant.nf4_dense(same, shape, torch.float32), theirs.dequantize_4bit(codes, state)), "widening is exact"
    swapped = ((codes.flatten() & 15) << 4) | (codes.flatten() >> 4)
    assert not torch.equal(quant.nf4_dense(same._replace(codes=swapped), shape, torch.float32), theirs.dequantize_4bit(codes, state))


def test_int8_rounds_each_row_by_its_own_scale() -> None:
    weight = normal(40, 64) * torch.logspace(-3, 3, 40)[:, None]
    weight[7] = 0
    codes, scale = quant.int8(weight)
    out = quant.int8_dense(codes, scale, torch.float32)
    assert codes.dtype == torch.int8 and ((out - weight).abs() <= scale[:, None] / 2 + 1e-9).all() and (out[7] == 0).all()


@pytest.mark.parametrize("signed", [True, False])
def test_the_eight_bit_book_is_bitsandbytes(signed: bool) -> None:
    theirs = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    book = quant.code_book(torch.device("cpu"), signed=signed)
    assert len(book) == 256 and torch.equal(book, theirs.create_dynamic_map(signed=signed))
    values = normal(1000).abs() if not signed else normal(1000)
    codes, largest = quant.bytes_of(values, signed=signed)
    out = quant.bytes_dense(codes, largest, signed=signed)
    assert ((out - values).abs() <= 0.02 * largest.repeat_interleave(256)[:1000]).all() and codes.dtype == torch.uint8
    small = values.abs() < 0.01 * largest.repeat_interleave(256)[:1000]
    assert ((out - values).abs()[small] < 4e-4 * largest.max()).all(), "small numbers keep their digits: even steps would lose a hundredth"
