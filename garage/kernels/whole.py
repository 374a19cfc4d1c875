"""A decoder layer of answering on a CPU as one call (`native/layer.cpp`): the ops of `compiled`, in their order, bit for bit.

Calling an op from Python costs about as much as a small op does, and a step of one token has some four hundred. Weights are given as
addresses, so they must stay where they are while the layer is used.

Limits: bf16 and matrices in tiles; whoever calls looks at the rest with `can_run`.
Shape suffixes: T tokens of the step, D model width.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from garage.kernels import compiled, native
from garage.kernels.paths import is_plain
from garage.kernels.tiles import Tiles

_ADDRESS, _COUNT = ctypes.c_void_p, ctypes.c_int64
_OPS = ("rms_norm", "norm_rotate", "gated", "paged_write", "paged_attend", "product_bf16", "product_narrow")
_NORMS = ("before_mix", "after_mix", "before_feed", "after_feed", "q_norm", "k_norm")
_SIZES = ("heads", "kv_heads", "head_width", "window")


class _Calls(ctypes.Structure):
    _fields_ = [(name, _ADDRESS) for name in _OPS]


class _Matrix(ctypes.Structure):
    _fields_ = [*((name, _ADDRESS) for name in Tiles._fields), ("outputs", _COUNT), ("width", _COUNT)]


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, _Matrix) for name in ("qkv", "out", "gate_up", "down")), *((name, _ADDRESS) for name in _NORMS),
        *((name, _COUNT) for name in _SIZES), *((name, ctypes.c_float) for name in ("scale", "eps", "offset")),
        *((name, ctypes.c_int) for name in ("rounds_first", "is_gelu")),
    ]  # fmt: skip


class _Step(ctypes.Structure):
    _fields_ = [
        *((name, _COUNT) for name in ("tokens", "requests", "table_stride", "page")),
        *((name, _ADDRESS) for name in ("slots", "tables", "starts", "contexts")), ("threads", _COUNT),
    ]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Form:
    """What a layer is beside its matrices. `norms` are the weights before and after attention, before and after the MLP, of queries and of
    keys; None where there is none."""

    norms: Sequence[Tensor | None]
    heads: int
    kv_heads: int
    head_width: int
    window: int | None
    scale: float
    eps: float
    offset: float
    is_gelu: bool


class Whole:
    """One layer; `matrices` are q/k/v, output, gate/up and down as tiles with their shapes."""

    def __init__(self, matrices: Sequence[tuple[Tiles, tuple[int, int]]], form: Form) -> None:
        self._alive = (matrices, form)
        made = [_Matrix(*(part.data_ptr() if part.numel() else None for part in tiles), *shape) for tiles, shape in matrices]
        norms = [None if weight is None else weight.data_ptr() for weight in form.norms]
        sizes = (form.heads, form.kv_heads, form.head_width, form.window or 1 << 30)
        numbers = (form.scale, form.eps, form.offset, int(not form.offset), int(form.is_gelu))
        self._layer = ctypes.byref(_Layer(*made, *norms, *sizes, *numbers))

    def run(self, x_TD: Tensor, pools: tuple[Tensor, Tensor], step: "Step", angles: tuple[Tensor, Tensor]) -> Tensor:
        """x after the layer, changed in place."""
        calls, loops = _library()  # type: ignore[misc]
        at = [tensor.data_ptr() for tensor in (x_TD, *pools, *angles)]
        loops.layer(calls, self._layer, step.form, *at)
        return x_TD


class Step:
    """What the layers of a step that share a page table have in common."""

    def __init__(self, slots_T: Tensor, tables_BP: Tensor, contexts_B: Tensor, rows: tuple[int, ...], page: int) -> None:
        starts_B = compiled.starts(rows)
        self._alive = (slots_T, tables_BP, contexts_B, starts_B)
        at = [tensor.data_ptr() for tensor in (slots_T, tables_BP, starts_B, contexts_B)]
        self.form = ctypes.byref(_Step(len(slots_T), len(rows), tables_BP.stride(0), page, *at, torch.get_num_threads()))


def can_run(x_TD: Tensor, pool: Tensor) -> bool:
    """Whether a step of these hidden states over this pool of keys can be computed so."""
    is_ours = x_TD.dtype == pool.dtype == torch.bfloat16 and x_TD.is_contiguous() and x_TD.device.type == "cpu"
    return is_ours and torch.is_inference_mode_enabled() and not is_plain() and _library() is not None


@cache
def _library() -> tuple[object, ctypes.CDLL] | None:
    serve, product, loops = (native.loops_here(source) for source in (native.SERVE, native.PRODUCT, native.LAYER))
    if serve is None or product is None or loops is None or not compiled.prepare():
        return None
    loops.layer.argtypes = [_ADDRESS] * 8
    loops.layer.restype = None
    at = [ctypes.cast(getattr(product if name.startswith("product") else serve, name), _ADDRESS) for name in _OPS]
    return ctypes.byref(_Calls(*at)), loops
