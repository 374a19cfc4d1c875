"""Ops that are one kernel on CUDA, by their torch path; and which path is taken when."""

import logging
from types import SimpleNamespace

import pytest
import torch

from garage.kernels import columns, dispatch, mlp, norm, paths, reference
from garage.kernels import logits as rows

FORM = {"eps": 1e-6, "offset": 1.0, "rounds_first": False}


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def test_add_norm():
    x, residual, weight = draw(5, 8), draw(5, 8, seed=1), draw(8, seed=2)
    total, y = dispatch.add_norm(x, residual, weight, **FORM)
    assert torch.equal(total, x + residual) and (y - reference.rms_norm(x + residual, weight, **FORM)).abs().max() < 1e-12
    dx, dresidual = torch.autograd.grad((total, y), (x, residual), (draw(5, 8, seed=3), draw(5, 8, seed=4)))
    assert torch.equal(dx, dresidual)


def test_norm_rotate():
    x, weight, angle = draw(5, 3, 8), draw(8, seed=1), draw(5, 4, seed=2).detach()
    angles = angle.cos(), angle.sin()
    expected = reference.rotate(reference.rms_norm(x, weight, **FORM), *angles)
    assert (dispatch.norm_rotate(x, weight, angles, **FORM) - expected).abs().max() < 1e-12


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_cross_entropy(softcap):
    logits, targets, scale = draw(6, 9), torch.tensor([0, 8, 3, 3, 1, 7]), draw(6, seed=1).detach()
    capped = softcap * torch.tanh(logits / softcap) if softcap else logits
    loss = torch.nn.functional.cross_entropy(capped, targets, reduction="none")
    (slope,) = torch.autograd.grad((loss * scale).sum(), logits)
    found = rows.cross_entropy_(used := logits.detach().clone(), targets, scale=scale, softcap=softcap)
    assert (found.loss_R - loss).abs().max() < 1e-12 and (used - slope).abs().max() < 1e-12
    assert (found.logsumexp_R - capped.logsumexp(1)).abs().max() < 1e-12 and torch.equal(found.is_hit_R, capped.argmax(1) == targets)
    kept = rows.cross_entropy_(same := logits.detach().clone(), targets, scale=None, softcap=softcap)
    assert torch.equal(same, logits) and torch.equal(kept.loss_R, found.loss_R)


def test_columns():
    y, dy, gain = draw(5, 8).detach(), draw(5, 8, seed=1).detach(), draw(8, seed=2).detach()
    sums = columns.scale_and_sum_(used := dy.clone(), y, gain)
    assert torch.equal(used, dy * gain) and torch.equal(sums, (dy * y).sum(0))
    assert torch.equal(columns.scale_(y.clone(), gain), y * gain)


def test_which_path(monkeypatch, caplog):
    """Triton for CUDA tensors of up to 32 bits where it is installed; one line in the log says so."""
    on_gpu, wide = (SimpleNamespace(is_cuda=True, dtype=dtype) for dtype in (torch.bfloat16, torch.float64))
    for installed in (True, False):
        paths._has_triton.cache_clear()
        monkeypatch.setattr(paths, "find_spec", lambda name, installed=installed: object() if installed else None)
        monkeypatch.setattr(paths, "import_module", lambda name: name)
        paths._twin.cache_clear()
        with caplog.at_level(logging.INFO, "garage.kernels.paths"):
            caplog.clear()
            found = [paths.path(norm, x) for x in (on_gpu, wide, torch.ones(1))]
            assert paths.path(mlp, on_gpu) == ("garage.kernels.triton_mlp" if installed else mlp)
        assert found == ["garage.kernels.triton_norm" if installed else norm, norm, norm]
        assert len(caplog.records) == 1 and ("Triton kernels" in caplog.text) == installed
    paths._has_triton.cache_clear()
    paths._twin.cache_clear()
