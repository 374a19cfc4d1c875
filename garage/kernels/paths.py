"""Which module of ops works on a tensor.

A module `x.py` may have a twin `triton_x.py` with the same names. It is taken for CUDA tensors of 32 bits or fewer if triton is installed,
and is imported by name then, so that a process without a GPU loads no compiler.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

_is_plain: ContextVar[bool] = ContextVar("is_plain", default=False)
_log = logging.getLogger(__name__)


@contextmanager
def plainly() -> Iterator[None]:
    """Inside, every op is its plain torch path: neither Triton nor the native routine. To compare with."""
    token = _is_plain.set(True)
    try:
        yield
    finally:
        _is_plain.reset(token)


def is_plain() -> bool:
    """Whether the plain paths are asked for."""
    return _is_plain.get()


def is_fused(x: Tensor) -> bool:
    """Whether the ops on `x` are Triton kernels."""
    return x.is_cuda and not is_plain() and x.dtype != torch.float64 and _has_triton()


def path(plain: ModuleType, x: Tensor) -> Any:
    """`plain`, or its twin."""
    return _twin(plain.__name__) if is_fused(x) else plain


def has_dots(x: Tensor) -> bool:
    """Whether Triton's matrix products on `x` run on tensor cores; before sm_80 it makes them of single multiplications."""
    return is_fused(x) and torch.cuda.get_device_capability(x.device) >= (8, 0)


def fused(ops: str) -> Any:
    """Triton kernels that are no module's twin."""
    return _twin(f"{__package__}.{ops}")


@cache
def _twin(name: str) -> ModuleType:
    package, _, ops = name.rpartition(".")
    return import_module(f"{package}.triton_{ops}")


@cache
def _has_triton() -> bool:
    has = find_spec("triton") is not None
    _log.info("ops on CUDA are %s", "Triton kernels" if has else "plain torch: triton is not installed")
    return has
