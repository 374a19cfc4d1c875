"""The gate of the MLP and DoRA's columns, with results written over inputs, against float64."""

import pytest
import torch
from cases import FLOATS, broken, draw, exact, near

from garage.kernels import columns, mlp, reference, triton_columns, triton_mlp

SHAPES = [(1, 1), (3, 7), (5, 1152), (0, 8), (2, 2049)]


def check_gated(kernels, shape, dtype, activation):
    gate, up, dact = (draw(*shape, dtype=dtype, seed=seed, scale=3.0) for seed in range(3))
    wide = exact(gate, up)
    act = reference.gated(*wide, activation=activation)
    dgate, dup = torch.autograd.grad(act, wide, dact.double())
    inputs = [t.clone().requires_grad_() for t in (gate, up)]
    ours = mlp.Gated.apply(*inputs, activation, kernels)
    for a, b in zip((ours, *torch.autograd.grad(ours, inputs, dact.clone())), (act, dgate, dup), strict=True):
        near(a, b)
    used = dact.clone()
    assert kernels.slopes(used, gate, up, activation)[0].data_ptr() == used.data_ptr()
    over = gate.clone()
    assert kernels.gate(over, up, activation, out=over) is over
    near(over, act)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
def test_gated(shape, dtype, activation):
    check_gated(triton_mlp, shape, dtype, activation)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gated_far_out(activation):
    """Where exp overflows and where the activation is flat."""
    gate = torch.tensor([-3e4, -300.0, -88.0, -20.0, 0.0, 20.0, 300.0, 3e4], dtype=torch.bfloat16, device=draw(1).device)
    dgate, dup = triton_mlp.slopes(torch.ones_like(gate), gate, torch.ones_like(gate), activation)
    assert dgate.isfinite().all() and torch.equal(dgate[-2:], torch.ones_like(dgate[-2:])) and dgate[:2].abs().max() == 0
    near(dup[4:], gate[4:])


@pytest.mark.parametrize("old, new", [("(1.0 - s) * slope", "s * slope"), ("0.134145", "0.044715"), ("at < numel", "at < numel - 1")])
def test_a_broken_gate_is_caught(tmp_path, old, new):
    with pytest.raises(AssertionError, match="the limit"):
        check_gated(broken(tmp_path, "triton_mlp", old, new), (3, 24), torch.bfloat16, "gelu_tanh")


def check_columns(kernels, shape, dtype):
    y, dy, gain = draw(*shape, dtype=dtype), draw(*shape, dtype=dtype, seed=1), draw(shape[1], seed=2) + 2
    for module in (kernels, columns):
        scaled, slope = y.clone(), dy.clone()
        near(module.scale_(scaled, gain), y.double() * gain.double())
        sums = module.scale_and_sum_(slope, y, gain)
        near(sums, (dy.double() * y.double()).sum(0), floor=2e-5)
        near(slope, dy.double() * gain.double())
        assert sums.dtype == torch.float32


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (33, 640), (50, 129), (0, 8)])
def test_columns(shape, dtype, monkeypatch):
    monkeypatch.setattr(triton_columns, "SHARES", 2)
    check_columns(triton_columns, shape, dtype)


@pytest.mark.parametrize("old, new", [("total += dy * y", "total += dy * y * gain"), ("y * gain, mask", "y, mask"), ("tile * R", "0 * R")])
def test_broken_columns_are_caught(tmp_path, old, new):
    with pytest.raises(AssertionError, match="the limit"):
        check_columns(broken(tmp_path, "triton_columns", old, new), (33, 7), torch.bfloat16)
