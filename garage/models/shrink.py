"""Make the adapters of a model smaller without starting again: a lower rank, no magnitudes, fewer targets.

- A lower rank keeps the nearest product of that rank (singular values of B A, from the small factors), at the same scale.
- Without magnitudes, y = (m / n) (W + s B A) x becomes W x + s (m / n) B A x: what m / n did to W itself is given up.
- A linear that is no target any more is the base's again.
A change that has not moved yet (B = 0) loses nothing in any of them.
"""

from collections.abc import Sequence

import torch
from torch import nn

from garage.models.adapters import DoRA, LoRA
from garage.models.layers import Model
from garage.models.targets import spelled_out
from garage.store.adapter import is_named


@torch.no_grad()
def shrink(model: Model, *, rank: int, dora: bool, targets: Sequence[str]) -> None:
    """Give every adapter at most this rank, magnitudes only if `dora`, and remove those that none of `targets` names."""
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, LoRA)]
    for name, lora in found:
        if not any(is_named(name, target) for target in spelled_out(targets)):
            model.set_submodule(name, lora.base)
            continue
        if isinstance(lora, DoRA) and not dora:
            lora = _without_magnitudes(lora)
            model.set_submodule(name, lora)
        _lower(lora, rank)


def _without_magnitudes(dora: DoRA) -> LoRA:
    lora = LoRA(dora.base, rank=len(dora.lora_A), scale=dora.scale, dropout=dora.dropout, dtype=dora.lora_A.dtype)
    lora.lora_A = dora.lora_A
    lora.lora_B = nn.Parameter(dora.lora_B * (dora.lora_magnitude_vector / dora.row_norms())[:, None].to(dora.lora_B.dtype))
    return lora


def _lower(lora: LoRA, rank: int) -> None:
    """B A by its `rank` largest singular values: with B = Q R and A^T = P S, those of R S^T."""
    if rank >= len(lora.lora_A):
        return
    a_RI, b_OR = lora.lora_A.detach(), lora.lora_B.detach()
    if bool(b_OR.any()):
        dtype, (q_OR, r_RR), (p_IR, s_RR) = a_RI.dtype, torch.linalg.qr(b_OR.float()), torch.linalg.qr(a_RI.float().T)
        left_RR, values_R, right_RR = torch.linalg.svd(r_RR @ s_RR.T)
        root_R = values_R[:rank].sqrt()
        b_OR, a_RI = ((q_OR @ left_RR[:, :rank]) * root_R).to(dtype), (root_R[:, None] * (right_RR[:rank] @ p_IR.T)).to(dtype)
    lora.lora_A, lora.lora_B = nn.Parameter(a_RI[:rank].clone()), nn.Parameter(b_OR[:, :rank].clone())
