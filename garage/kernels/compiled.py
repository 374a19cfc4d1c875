"""The ops of answering on a CPU, compiled: `native/serve.cpp` for what is small, `native/product.cpp` for products with `tiles`.

They are taken inside `torch.inference_mode` alone, so that evaluation while training keeps the arithmetic of training. Each returns
None where the torch path has to do it: other devices and dtypes than bf16 and fp32, widths that are no multiple of a vector, odd
strides, no compiler.
Sums are fp32 and are rounded once, so results differ from torch's by rounding. Small work is one thread's.

Shape suffixes: T tokens of the step, B requests, P pages of one request, N query heads, M key/value heads, H head width, F MLP width,
I inputs, O outputs.
"""

import ctypes
from functools import cache, lru_cache
from itertools import accumulate

import torch
from torch import Tensor

from garage.kernels import native
from garage.kernels.paths import is_plain

LANES = 16
_TYPES = {"p": ctypes.c_void_p, "l": ctypes.c_int64, "f": ctypes.c_float, "i": ctypes.c_int}
_SERVE = {"rms_norm": "pppllffiii", "norm_rotate": "pppppllllffiii", "gated": "pppllllii" + "i", "paged_write": "pppppllll" + "i",
          "best_of": "pplllii", "paged_attend": "ppppppp" + "llllllll" + "fii"}  # fmt: skip
_PRODUCT = {"product_bf16": "ppplll" + "i", "product_narrow": "pppppp" + "lll" + "ii"}


@cache
def _typed(source: str) -> ctypes.CDLL | None:
    path, signatures = (native.SERVE, _SERVE) if source == "serve" else (native.PRODUCT, _PRODUCT)
    loops = native.loops_here(path)
    for name, letters in signatures.items() if loops is not None else ():
        getattr(loops, name).argtypes = [_TYPES[letter] for letter in letters]
    return loops


def prepare() -> bool:
    """Compile what was never compiled here; whether all of it is there."""
    return all(_typed(source) is not None for source in ("serve", "product"))


def has_products() -> bool:
    """Whether products with tiles are compiled here."""
    return _typed("product") is not None


def _loops(x: Tensor, source: str = "serve") -> ctypes.CDLL | None:
    is_ours = x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float32) and torch.is_inference_mode_enabled()
    return _typed(source) if is_ours and not is_plain() else None


def _is_bf16(x: Tensor) -> int:
    return int(x.dtype == torch.bfloat16)


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float, rounds_first: bool) -> Tensor | None:
    """See `reference.rms_norm`."""
    width = x.shape[-1]
    if (loops := _loops(x)) is None or width % LANES or weight.dtype != x.dtype or not x.is_contiguous():
        return None
    y, at = torch.empty_like(x), (x.data_ptr(), weight.data_ptr())
    loops.rms_norm(*at, y.data_ptr(), x.numel() // width, width, eps, offset, rounds_first, _is_bf16(x), torch.get_num_threads())
    return y


def norm_rotate(
    x_TNH: Tensor, weight_H: Tensor, angles: tuple[Tensor, Tensor], eps: float, offset: float, rounds_first: bool
) -> Tensor | None:
    """`reference.rotate` of the norm of each head."""
    (tokens, heads, width), fits = x_TNH.shape, all(t.dtype == x_TNH.dtype and t.is_contiguous() for t in (weight_H, *angles))
    if (loops := _loops(x_TNH)) is None or width % (2 * LANES) or not fits or x_TNH.stride()[1:] != (width, 1):
        return None
    y_TNH = torch.empty((tokens, heads, width), dtype=x_TNH.dtype)
    at = [t.data_ptr() for t in (x_TNH, weight_H, *angles, y_TNH)]
    form = (eps, offset, rounds_first, _is_bf16(x_TNH), torch.get_num_threads())
    loops.norm_rotate(*at, tokens, heads, width, x_TNH.stride(0), *form)
    return y_TNH


def gated(gate_TF: Tensor, up_TF: Tensor, activation: str) -> Tensor | None:
    """See `reference.gated`."""
    if (loops := _loops(gate_TF)) is None or gate_TF.ndim != 2 or gate_TF.shape[1] % LANES:
        return None
    if gate_TF.stride(1) != 1 or up_TF.stride(1) != 1 or up_TF.dtype != gate_TF.dtype:
        return None
    (rows, width), y_TF = gate_TF.shape, torch.empty(gate_TF.shape, dtype=gate_TF.dtype)
    at = (gate_TF.data_ptr(), up_TF.data_ptr(), y_TF.data_ptr())
    form = (int(activation != "silu"), _is_bf16(y_TF), torch.get_num_threads())
    loops.gated(*at, rows, width, gate_TF.stride(0), up_TF.stride(0), *form)
    return y_TF


def best(x_RV: Tensor) -> Tensor | None:
    """The first place of each row's largest number; NaN counts as largest."""
    if (loops := _loops(x_RV)) is None or x_RV.stride(1) != 1 or not x_RV.numel():
        return None
    (rows, width), out_R = x_RV.shape, torch.empty(len(x_RV), dtype=torch.int64)
    loops.best_of(x_RV.data_ptr(), out_R.data_ptr(), rows, width, x_RV.stride(0), _is_bf16(x_RV), torch.get_num_threads())
    return out_R


def takes_pages(q_TNH: Tensor, pool: Tensor) -> bool:
    """Whether `write` and `attend` can be called for these queries and this pool of keys."""
    return pool.dtype == q_TNH.dtype and q_TNH.shape[2] % LANES == 0 and _loops(q_TNH) is not None


def write(keys: Tensor, values: Tensor, slots_T: Tensor, k_TMH: Tensor, v_TMH: Tensor) -> None:
    """Put this step's keys and values into their slots (page * page size + offset)."""
    (k_TMH, v_TMH), loops = (_rows(part) for part in (k_TMH, v_TMH)), _loops(keys)
    assert loops is not None and keys.is_contiguous() and values.is_contiguous() and slots_T.is_contiguous()
    at = [t.data_ptr() for t in (k_TMH, v_TMH, keys, values, slots_T)]
    loops.paged_write(*at, len(slots_T), k_TMH[0].numel(), k_TMH.stride(0), v_TMH.stride(0), _is_bf16(keys))


def attend(
    q_TNH: Tensor, pools: tuple[Tensor, Tensor], tables_BP: Tensor, contexts_B: Tensor, rows: tuple[int, ...], *,
    scale: float, window: int | None,
) -> Tensor:  # fmt: skip
    """The mix for every row; `rows` of each request, the last of its `contexts_B` tokens. Only visible slots are read."""
    q_TNH, loops, (_, page_size, kv_heads, width) = _rows(q_TNH), _loops(q_TNH), pools[0].shape
    assert loops is not None and tables_BP.stride(1) == 1 and contexts_B.dtype == tables_BP.dtype == torch.int64
    out_TNH, starts_B = torch.empty(q_TNH.shape, dtype=q_TNH.dtype), starts(rows)
    at = [t.data_ptr() for t in (q_TNH, *pools, out_TNH, tables_BP, starts_B, contexts_B)]
    shape = (tables_BP.stride(0), len(rows), q_TNH.shape[1], kv_heads, width, page_size, window or 1 << 30, q_TNH.stride(0))
    loops.paged_attend(*at, *shape, scale, _is_bf16(q_TNH), torch.get_num_threads())
    return out_TNH


def product(x_TI: Tensor, parts: tuple[Tensor, Tensor, Tensor, Tensor], outputs: int) -> Tensor | None:
    """x W^T for W in tiles (`tiles.Tiles`): of bf16 if x is, or of 8 or 4 bits, for which x is rounded to 8 bits row by row."""
    codes, factors, scales, sums = (part.data_ptr() if part.numel() else None for part in parts)
    if not x_TI.is_contiguous() or (scales is None and x_TI.dtype != torch.bfloat16) or (loops := _loops(x_TI, "product")) is None:
        return None
    y, width, threads = torch.empty((*x_TI.shape[:-1], outputs), dtype=x_TI.dtype), x_TI.shape[-1], torch.get_num_threads()
    x_at, y_at, sizes = x_TI.data_ptr(), y.data_ptr(), (x_TI.numel() // width, outputs, width)
    if scales is None:
        loops.product_bf16(x_at, codes, y_at, *sizes, threads)
    else:
        loops.product_narrow(x_at, codes, factors, scales, sums, y_at, *sizes, _is_bf16(y), threads)
    return y


@lru_cache(16)
def starts(rows: tuple[int, ...]) -> Tensor:
    """Where the rows of each request begin, and the end."""
    return torch.tensor(list(accumulate(rows, initial=0)))


def _rows(x_TNH: Tensor) -> Tensor:
    """With the heads of a token side by side; tokens may lie apart."""
    return x_TNH if x_TNH.stride()[1:] == (x_TNH.shape[2], 1) else x_TNH.contiguous()
