"""What the cases share: inputs, the distance from float64 that rounding explains, and broken twins of a kernel's source."""

import importlib.util
import os
from pathlib import Path

import torch

from garage.kernels import dispatch

DEVICE = os.environ["KERNELS_ON"]
KERNELS = Path(dispatch.__file__).parent
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def draw(*shape, dtype=torch.float32, seed=0, scale=1.0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(DEVICE, dtype)


def near(ours, exact, *, roundings=1, floor=1e-5):
    """A number that was rounded k times is off by k times half an ulp of itself; fp32 sums inside are off by `floor` of the usual size.

    A rounding of a neighbour (half an ulp of the largest number in 1,000) or a wrong term is far outside both."""
    assert ours.shape == exact.shape, (ours.shape, exact.shape)
    ours, exact, half = ours.double(), exact.double(), torch.finfo(ours.dtype).eps / 2
    usual = exact.square().mean().sqrt() if exact.numel() else 0.0
    limit = roundings * half * exact.abs() + floor * usual + 1e-7 * (ours.dtype == torch.float16)
    off = (ours - exact).abs()
    assert bool((off <= limit).all()), f"{float((off / limit).max()):.3g} times the limit; NaN: {int(ours.isnan().sum())}"


def exact(*tensors):
    """Float64 copies that take gradients."""
    return [t.detach().double().requires_grad_() for t in tensors]


def broken(tmp_path, name, old, new):
    """The module of kernels with one thing wrong in its source."""
    source = (KERNELS / f"{name}.py").read_text()
    assert source.count(old) >= 1, f"{name} has no {old!r}"
    place = tmp_path / f"{name}.py"
    place.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location(f"broken_{name}", place)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
