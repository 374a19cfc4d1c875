"""Each op against its definition, forward and backward, in float64 and bf16, with and without gradients; broken twins fail."""

from functools import partial

import pytest
import torch

from garage.kernels import dispatch, packed, reference

NORMS = [(0.0, True), (1.0, False)]


def draw(*shape, dtype=torch.float64, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype).requires_grad_()


def compare(ours, definition, inputs, tolerance):
    """Outputs and gradients of both under the same upstream gradient."""
    outs = [f(*inputs) for f in (ours, definition)]
    upstream = draw(*outs[0].shape, dtype=outs[0].dtype, seed=9).detach()
    grads = [torch.autograd.grad(out, inputs, upstream.clone()) for out in outs]  # an op may overwrite what it is given
    for a, b in zip((outs[0], *grads[0]), (outs[1], *grads[1]), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        assert (a - b).abs().max() <= tolerance * max(1.0, float(b.abs().max()))
    with torch.no_grad():
        assert torch.equal(ours(*inputs), outs[0])


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("shape", [(5, 48), (7, 3, 16), (1, 8)])
@pytest.mark.parametrize("offset, rounds_first", NORMS)
def test_rms_norm(dtype, tolerance, shape, offset, rounds_first):
    form = {"eps": 1e-6, "offset": offset, "rounds_first": rounds_first}
    inputs = (draw(*shape, dtype=dtype), draw(shape[-1], dtype=dtype, seed=1))
    compare(lambda x, w: dispatch.rms_norm(x, w, **form), lambda x, w: reference.rms_norm(x, w, **form), inputs, tolerance)
    with torch.no_grad():
        other = reference.rms_norm(*inputs, **{**form, "offset": 1.0 - offset})
        assert (dispatch.rms_norm(*inputs, **form) - other).abs().max() > 0.1


def test_rms_norm_of_fp32_weight_on_bf16_rows():
    """Master weights: the gradient is fp32 although the rows are bf16."""
    x, weight = draw(6, 32, dtype=torch.bfloat16), draw(32, dtype=torch.float32, seed=1)
    for offset, rounds_first in NORMS:
        y = dispatch.rms_norm(x, weight, eps=1e-6, offset=offset, rounds_first=rounds_first)
        dx, dw = torch.autograd.grad(y.float().sum(), (x, weight))
        assert (y.dtype, dx.dtype, dw.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_rotate(dtype, tolerance):
    angle = draw(9, 8).detach()
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    inputs = (draw(9, 3, 16, dtype=dtype, seed=2),)
    compare(lambda x: dispatch.rotate(x, cos, sin), lambda x: reference.rotate(x, cos, sin), inputs, tolerance)
    neighbours = torch.stack([inputs[0][..., 0::2] * cos[:, None] - inputs[0][..., 1::2] * sin[:, None]], -1).flatten(-2)
    assert (dispatch.rotate(inputs[0], cos, sin)[..., :8] - neighbours).abs().max() > 0.1


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gated(dtype, tolerance, activation):
    inputs = (draw(5, 33, dtype=dtype), draw(5, 33, dtype=dtype, seed=1))
    ours, definition = (partial(module.gated, activation=activation) for module in (dispatch, reference))
    compare(ours, definition, inputs, tolerance)
    erf = torch.nn.functional.gelu(inputs[0]) * inputs[1]
    assert dtype == torch.bfloat16 or (dispatch.gated(*inputs, activation=activation) - erf).abs().max() > 1e-4


def test_linear_casts_the_weight_and_returns_its_dtype():
    x, weight = draw(6, 32, dtype=torch.bfloat16), draw(16, 32, dtype=torch.float32, seed=1)
    y = dispatch.linear(x, weight)
    dx, dw = torch.autograd.grad(y.float().square().sum(), (x, weight))
    assert (y.dtype, dx.dtype, dw.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    exact = x.double() @ weight.double().T
    assert (y - exact).abs().max() < 0.05 * exact.abs().max()
    assert (dw - 2 * exact.T @ x.double()).abs().max() < 0.05 * dw.abs().max()
    frozen = dispatch.linear(x, weight.detach())
    assert torch.autograd.grad(frozen.float().sum(), x)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("dropped", [False, True])
def test_low_rank(dropped):
    x, low, a, b = draw(7, 12), draw(7, 12, seed=1), draw(3, 12, seed=2), draw(10, 3, seed=3)
    weight = draw(10, 12, seed=4).detach()
    if dropped:
        compare(lambda *t: dispatch.low_rank(t[0], t[1], weight, t[2], t[3], scale=1.7),
                lambda *t: t[0] @ weight.T + 1.7 * (t[1] @ t[2].T) @ t[3].T, (x, low, a, b), 1e-12)  # fmt: skip
    else:
        compare(lambda *t: dispatch.low_rank(t[0], None, weight, t[1], t[2], scale=1.7),
                lambda *t: t[0] @ weight.T + 1.7 * (t[0] @ t[1].T) @ t[2].T, (x, a, b), 1e-12)  # fmt: skip


def definition(q, k, v, bounds, scale, window):
    document = torch.repeat_interleave(torch.arange(len(bounds) - 1), torch.tensor(bounds).diff())
    back = torch.arange(len(q))[:, None] - torch.arange(len(q))
    visible = (document[:, None] == document) & (back >= 0) & (back < (window or len(q)))
    return reference.attention(q, k, v, visible, scale)


@pytest.mark.parametrize("window", [None, 1, 4, 5, 64])
@pytest.mark.parametrize("bounds", [(0, 23), (0, 8, 16, 24), (0, 1, 6, 20, 25, 26, 39), (0, 4), (0, 12, 17)])
def test_packed_attention(bounds, window):
    inputs = tuple(draw(bounds[-1], heads, 8, seed=seed) for seed, heads in enumerate((4, 2, 2)))
    compare(lambda *t: packed.packed_attention(*t, bounds, scale=0.3, window=window),
            lambda *t: definition(*t, bounds, 0.3, window), inputs, 1e-12)  # fmt: skip
    if window == 4 and bounds[-1] > 5:
        wide = definition(*inputs, bounds, 0.3, 5)
        assert (packed.packed_attention(*inputs, bounds, scale=0.3, window=4) - wide).abs().max() > 1e-3


def test_documents_of_equal_length_share_one_call(monkeypatch):
    calls, real = [], packed.F.scaled_dot_product_attention
    monkeypatch.setattr(packed.F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or real(*a, **k))
    for bounds, expected in (((0, 8, 16, 24, 32), 1), ((0, 8, 11, 19, 22, 30), 2)):
        calls.clear()
        packed.packed_attention(*(draw(bounds[-1], 2, 8) for _ in range(3)), bounds, scale=1.0, window=None)
        assert len(calls) == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [None, 8])
def test_varlen_on_cuda(window):
    bounds = (0, 5, 45, 100)
    inputs = [draw(100, heads, 64, seed=seed, dtype=torch.bfloat16).detach().cuda() for seed, heads in enumerate((4, 2, 2))]
    device_bounds = torch.tensor(bounds, dtype=torch.int32, device="cuda")
    ours = dispatch.packed_attention(*inputs, bounds, device_bounds, scale=0.125, window=window)
    assert (ours.cpu() - definition(*(t.double().cpu() for t in inputs), bounds, 0.125, window)).abs().max() < 2e-2
