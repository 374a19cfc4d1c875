"""Checkpoints that bitsandbytes quantised to NF4, held as they are: no code is computed anew.

A matrix X is spread over several tensors of the files: `X.weight` (codes, two a byte), `X.weight.absmax` (scales of blocks of 64: fp32, or
8-bit codes with `nested_absmax`), the code books `quant_map` and `nested_quant_map`, and `quant_state.bitsandbytes__nf4`, a JSON text as
bytes with the shape and the mean of the scales. They may come in any order, and from several files.

Limits: NF4 in blocks of 64, nested in blocks of 256, which is what transformers writes; `config.refuse_method` names what is refused.
Source: bitsandbytes 0.50, transformers 5.23.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from garage.core.errors import UserError
from garage.kernels import quant
from garage.models.quantize import HeldNf4

_SHARED, _NESTED = {"", "absmax", "quant_map", "quant_state.bitsandbytes__nf4"}, {"nested_absmax", "nested_quant_map"}
_REMEDY = "use the unquantised checkpoint, or one in bitsandbytes' NF4"


def assembled(tensors: Iterator[tuple[Path, str, Tensor]]) -> Iterator[tuple[Path, str, Tensor | HeldNf4]]:
    """The tensors, with the parts of each NF4 matrix put together under its name.

    Raises:
        UserError: a part is missing, or does not fit the others or what we read; the matrix is named.
    """
    waiting: dict[str, dict[str, Tensor]] = {}
    for source, name, tensor in tensors:
        module, dot, part = name.partition(".weight.")
        if not dot and tensor.dtype != torch.uint8:
            yield source, name, tensor
            continue
        whole = f"{module}.weight" if dot else name
        parts = waiting.setdefault(whole, {})
        parts[part] = tensor.clone()
        if parts.keys() in (_SHARED, _SHARED | _NESTED) and ("nested_absmax" in parts) == (parts["absmax"].dtype == torch.uint8):
            yield source, whole, _held(whole, waiting.pop(whole))
    for name, parts in waiting.items():
        have = ", ".join(sorted(part or "weight" for part in parts))
        raise UserError(f"{name} is quantised, but is no whole bitsandbytes NF4 matrix: there is {have}", remedy=_REMEDY)


def _held(name: str, parts: Mapping[str, Tensor]) -> HeldNf4:
    try:
        state = json.loads(bytes(parts["quant_state.bitsandbytes__nf4"].tolist()))
        (rows, columns), blocks = map(int, state["shape"]), (state["blocksize"], state.get("nested_blocksize", quant.SCALES))
        dtype, offset = getattr(torch, state["dtype"]), torch.tensor(float(state.get("nested_offset", 0.0)))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{name}: its quant_state is damaged: {error!r}", remedy="download the model again") from error
    codes, scales, top = parts[""].flatten(), parts["absmax"], parts.get("nested_absmax", torch.zeros(0))
    sizes, numbers = (len(codes), len(scales), len(top)), torch.cat([top, scales.float(), offset[None]])
    count = -(-rows * columns // quant.BLOCK)
    needed = (-(-rows * columns // 2), count, -(-count // quant.SCALES) if len(top) else 0)
    books = ((parts["quant_map"], torch.tensor(quant.LEVELS)), (parts.get("nested_quant_map"), quant.code_book(torch.device("cpu"))))
    same = all(theirs is None or (theirs.shape == ours.shape and torch.allclose(theirs, ours, atol=1e-6)) for theirs, ours in books)
    sound = scales.dtype in (torch.uint8, torch.float32) and bool(numbers.isfinite().all())
    if blocks != (quant.BLOCK, quant.SCALES) or sizes != needed or not (same and sound):
        raise UserError(f"{name}: its blocks {blocks}, sizes {sizes} or code books are not those that are read", remedy=_REMEDY)
    padded = F.pad(codes, (0, count * quant.BLOCK // 2 - len(codes)))
    return HeldNf4.of(quant.Nf4(padded, scales, top, offset), torch.Size((rows, columns)), dtype)
