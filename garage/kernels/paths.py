"""Which module of ops works on a tensor.

A module `x.py` may have a twin `triton_x.py` with the same names. It is taken for CUDA tensors of 32 bits or fewer if triton is installed,
and is imported by name then, so that a process without a GPU loads no compiler.
"""

import logging
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

_log = logging.getLogger(__name__)


def is_fused(x: Tensor) -> bool:
    """Whether the ops on `x` are Triton kernels."""
    return x.is_cuda and x.dtype != torch.float64 and _has_triton()


def path(plain: ModuleType, x: Tensor) -> Any:
    """`plain`, or its twin."""
    return _twin(plain.__name__) if is_fused(x) else plain


@cache
def _twin(name: str) -> ModuleType:
    package, _, ops = name.rpartition(".")
    return import_module(f"{package}.triton_{ops}")


@cache
def _has_triton() -> bool:
    has = find_spec("triton") is not None
    _log.info("ops on CUDA are %s", "Triton kernels" if has else "plain torch: triton is not installed")
    return has
