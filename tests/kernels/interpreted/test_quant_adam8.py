"""Few bits: NF4 and int8 equal the torch path bit for bit, the 8-bit optimizer step does but for the last bit of a sum."""

import pytest
import torch
from cases import FLOATS, broken, draw

from garage.kernels import adam8, quant, triton_adam8, triton_quant

SHAPES = [(1, 1), (3, 7), (64, 64), (5, 1152), (130, 640), (8, 8)]


def check_nf4(kernels, shape, dtype):
    weight = draw(*shape, dtype=dtype, scale=0.05)
    if shape == (8, 8):
        weight.zero_()
    theirs, ours = quant.nf4(weight), kernels.nf4(weight)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)), "codes or scales differ"
    for out in FLOATS:
        assert torch.equal(kernels.nf4_dense(theirs, shape, out), quant.nf4_dense(theirs, shape, out)), "widened numbers differ"


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_nf4(shape, dtype):
    check_nf4(triton_quant, shape, dtype)


@pytest.mark.parametrize(
    "old, new",
    [
        ("high * 16 + low", "low * 16 + high"),
        ("static_range(15)", "static_range(14)"),
        ("+ tl.load(offset_ptr)", ""),
        ("codes >> 4", "codes & 15"),
        ("tl.max(tl.abs(weight), 1)", "tl.max(weight, 1)"),
    ],
)
def test_broken_nf4_is_caught(tmp_path, old, new):
    with pytest.raises(AssertionError, match="differ"):
        check_nf4(broken(tmp_path, "triton_quant", old, new), (130, 33), torch.float32)


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 1152), (0, 8)])
def test_int8(shape, tmp_path):
    codes, scale = quant.int8(draw(*shape)) if shape[0] else (torch.zeros(shape, dtype=torch.int8), torch.zeros(0))
    codes, scale = codes.to(draw(1).device), scale.to(draw(1).device)
    for dtype in FLOATS:
        assert torch.equal(triton_quant.int8_dense(codes, scale, dtype), quant.int8_dense(codes, scale, dtype))
    wrong = broken(tmp_path, "triton_quant", "codes * tl.load(scale_ptr + row)", "codes * tl.load(scale_ptr)")
    if shape[0] > 1:
        assert not torch.equal(wrong.int8_dense(codes, scale, dtype), quant.int8_dense(codes, scale, dtype))


def check_adam8(kernels, shape, *, steps=6):
    """Both from the same means at every step: a last bit may move a number over the middle of two codes, seldom and by one code."""
    ours = draw(*shape, scale=0.1)
    theirs, means = ours.clone(), adam8.Means.zero(ours)
    for number in range(1, steps + 1):
        step = adam8.Step(lr=1e-2, decay=0.1, beta1=0.9, beta2=0.95, eps=1e-8, number=float(number))
        grad = draw(*shape, seed=number) * draw(shape[0], 1, seed=7).exp()
        if number == 2:
            grad[0] = 0
        found = kernels.update(ours, grad, adam8.Means(*(part.clone() for part in means)), step)
        means = adam8.update(theirs, grad, means, step)
        far = ((ours - theirs).abs() / (1e-6 + theirs.abs() * 1e-5)).max()
        assert far <= 1, f"weights differ by {far:.3g} times the limit in step {number}"
        for name, a, b in zip(means._fields, found, means, strict=True):
            off = (a.float() - b.float()).abs()
            if name.endswith("max"):
                assert bool((off <= 1e-6 * b).all()), f"{name} differs"
            else:
                assert off.max() <= 1 and (off > 0).float().mean() <= 0.002, f"{name} differs: {off.max()}, {(off > 0).float().mean():.2%}"
        ours = theirs.clone()
    assert means.square.min() >= 1


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (8, 256), (3, 1152), (130, 33)])
def test_adam8(shape):
    check_adam8(triton_adam8, shape)


@pytest.mark.parametrize(
    "old, new",
    [
        ("middles2_ptr), 1)", "middles2_ptr), 0)"),
        ("(128 >> halving) - 1", "(64 >> halving)"),
        ("weight * keep - step", "weight - step"),
        ("square * beta2", "square"),
        ("tl.div_rn(square, unbias)", "square"),
    ],
)
def test_a_broken_step_is_caught(tmp_path, old, new):
    with pytest.raises(AssertionError, match="differ"):
        check_adam8(broken(tmp_path, "triton_adam8", old, new), (130, 33))
