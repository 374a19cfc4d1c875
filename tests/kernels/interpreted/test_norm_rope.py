"""RMSNorm with its sums, and the norm and turn of queries and keys, forward and backward, against float64."""

import pytest
import torch
from cases import FLOATS, broken, draw, exact, near

from garage.kernels import reference, rope, triton_norm, triton_rope

FORMS = [(1e-6, 0.0, True), (1e-6, 1.0, False)]
SHAPES = [(1, 2), (3, 7), (5, 640), (2, 3, 1152), (0, 16), (130, 24)]


def definition(x, weight, form):
    return reference.rms_norm(x, weight, eps=form[0], offset=form[1], rounds_first=False)


def check_norm(kernels, shape, dtype, form, *, masters=False):
    x, weight = draw(*shape, dtype=dtype), draw(shape[-1], dtype=torch.float32 if masters else dtype, seed=1)
    dy = draw(*shape, dtype=dtype, seed=2)
    wide = exact(x, weight)
    y = definition(*wide, form)
    dx, dw = torch.autograd.grad(y, wide, dy.double())
    ours, rstd = kernels.normalize(x, weight, *form)
    near(ours, y, roundings=4 if form[2] else 1)  # the normed row, the gain of a master weight, their product
    slopes = kernels.backward(dy, x, weight, rstd, form[1])
    near(slopes[0], dx)
    near(slopes[1], dw)
    assert (slopes[0].dtype, slopes[1].dtype) == (dtype, weight.dtype)
    assert kernels.backward(dy, x, weight, rstd, form[1], trains_weight=False)[1] is None


def check_add(kernels, shape, dtype, form):
    x, residual, weight = draw(*shape, dtype=dtype), draw(*shape, dtype=dtype, seed=3), draw(shape[-1], dtype=dtype, seed=1)
    dy, other = draw(*shape, dtype=dtype, seed=2), draw(*shape, dtype=dtype, seed=4)
    total, wide = x + residual, exact(x + residual, weight)
    y = definition(*wide, form)
    dx, dw = torch.autograd.grad(y, wide, dy.double())
    inputs = [t.requires_grad_() for t in (x, residual, weight)]
    ours = kernels.AddNorm.apply(*inputs, *form)
    assert torch.equal(ours[0], total)
    near(ours[1], y, roundings=4 if form[2] else 1)
    slopes = torch.autograd.grad(ours, inputs, (other, dy))
    near(slopes[0], dx + other)
    assert torch.equal(slopes[0], slopes[1])
    near(slopes[2], dw)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_norm(shape, dtype, form):
    check_norm(triton_norm, shape, dtype, form)


@pytest.mark.parametrize("form", FORMS)
def test_norm_of_master_weights_and_of_many_tiles(form, monkeypatch):
    check_norm(triton_norm, (5, 640), torch.bfloat16, form, masters=True)
    monkeypatch.setattr(triton_norm, "PROGRAMS", 2)
    check_norm(triton_norm, (9, 1152), torch.bfloat16, form)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("form", FORMS)
def test_add_norm(dtype, form):
    for shape in ((3, 7), (2, 2, 1152)):
        check_add(triton_norm, shape, dtype, form)


def test_rows_that_do_not_lie_together():
    x, weight = draw(16, 6), draw(16, seed=1)
    y, _ = triton_norm.normalize(x.T, weight, 1e-6, 0.0, True)
    near(y, definition(*exact(x.T, weight), (1e-6, 0.0, True)), roundings=4)


@pytest.mark.parametrize(
    "old, new",
    [
        ("x = tl.load(x_ptr + at, mask, 0.0)", "x = tl.load(x_ptr + at, mask, 1.0)"),
        ("dy * gain - normal * share", "dy * gain + normal * share"),
        ("wide * wide, 1) / width", "wide * wide, 1) / BLOCK"),
        ("dw += dy * normal", "dw += dy * normal * rstd"),
        ("(column < width)", "(column < width - 1)"),
    ],
)
def test_a_broken_norm_is_caught(tmp_path, old, new):
    with pytest.raises(AssertionError, match="the limit"):
        check_norm(broken(tmp_path, "triton_norm", old, new), (3, 24), torch.bfloat16, FORMS[1])


def test_a_broken_sum_is_caught(tmp_path):
    with pytest.raises(AssertionError, match="the limit"):
        check_add(broken(tmp_path, "triton_norm", "dx += tl.load(", "dx -= tl.load("), (3, 24), torch.bfloat16, FORMS[1])


def check_rope(kernels, shape, dtype, form, *, masters=False):
    width, halves = shape[2], (shape[0], shape[2] // 2)
    x, weight = draw(*shape, dtype=dtype), draw(width, dtype=torch.float32 if masters else dtype, seed=1)
    angle = draw(*halves, seed=2)
    cos, sin, dy = angle.cos().to(dtype), angle.sin().to(dtype), draw(*shape, dtype=dtype, seed=3)
    wide = exact(x, weight)
    y = reference.rotate(definition(*wide, form), cos.double(), sin.double())
    inputs = [t.requires_grad_() for t in (x, weight)]
    ours = kernels.NormRotate.apply(*inputs, cos, sin, *form)
    # Both halves of the normed head are rounded before they turn, so a small result carries the rounding of a large half.
    near(ours, y, roundings=1, floor=1e-5 + 12 * torch.finfo(dtype).eps)
    for a, b in zip(torch.autograd.grad(ours, inputs, dy), torch.autograd.grad(y, wide, dy.double()), strict=True):
        near(a, b)
    plain = reference.rotate(x.double(), cos.double(), sin.double())
    near(kernels.turn(x.detach(), cos, sin), plain)
    (dx,) = torch.autograd.grad(rope.Rotate.apply(x, cos, sin, kernels), x, dy)
    near(dx, reference.rotate(dy.double(), cos.double(), -sin.double()))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(1, 1, 2), (7, 3, 16), (4, 2, 256), (0, 2, 8), (5, 2, 24)])
def test_norm_rotate(shape, dtype, form):
    check_rope(triton_rope, shape, dtype, form, masters=shape[2] == 16)


def test_norm_rotate_of_many_tiles(monkeypatch):
    monkeypatch.setattr(triton_rope, "PROGRAMS", 2)
    check_rope(triton_rope, (50, 3, 128), torch.bfloat16, FORMS[0])


@pytest.mark.parametrize(
    "old, new",
    [
        ("a * cos - b * sin", "a * cos + b * sin"),
        ("q * cos - p * sin", "q * cos + p * sin"),
        ("+ db * b * second", ""),
        ("row // heads", "row // heads // 2"),
        ("weight_ptr + half + column", "weight_ptr + column"),
    ],
)
def test_a_broken_rope_is_caught(tmp_path, old, new):
    with pytest.raises(AssertionError, match="the limit"):
        check_rope(broken(tmp_path, "triton_rope", old, new), (7, 3, 24), torch.float16, FORMS[0])
