"""Where an adapter starts when not from zero: the base gives up what the adapter takes over.

- PiSSA (arXiv 2404.02948): s B A is the best product of its rank for W, the base becomes the rest, W - s B A, quantised if asked (QPiSSA).
- LoftQ (arXiv 2310.08659): by turns Q = quantised(W - s B A) and s B A = the best product for W - Q; the base becomes Q.

Either way base + s B0 A0 is W, or as near as quantising leaves it. So what was trained, base + s B A, is W + s (B A - B0 A0): a plain
LoRA of twice the rank, A' = [A; A0] and B' = [B, -B0], over the W as published (`plain`). Without quantising that is exact but for the
rounding of the rest to the base's dtype. With it, the file's model and the trained one differ by W - base - s B0 A0, whose size `begin`
returns; the adapter belongs to W as published, not to W in few bits.

Every matrix is read once more from the files, one at a time, so no wide copy of the model is needed. Small ones are factored exactly,
others by a seeded randomised SVD; an inexact factor leaves more in the base and breaks nothing. A resumed run computes the same again.

Limits: not with DoRA, nor over a checkpoint that is itself in few bits.
Shape suffixes: O outputs, I inputs, R rank.
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from garage.core.errors import UserError
from garage.core.seeds import derive
from garage.models.adapters import DoRA, LoRA, adapter_tensors, adapters_of, names_of
from garage.models.families import family_of
from garage.models.layers import Linear, Model
from garage.models.quantize import quantised
from garage.models.weights import tensors_of
from garage.store.adapter import AdapterConfig

_EXACT, _SPARE, _ROUNDS = 512, 16, 6  # up to this size an exact SVD; columns beyond the rank and power iterations of the other


@torch.no_grad()
def begin(model: Model, directory: Path, *, start: str, bits: str, iterations: int | None, seed: int) -> float:
    """Start the adapters of a model that was loaded from `directory` by "pissa" or "loftq"; `bits` are those its base is held in.

    Returns:
        The mean over the matrices of |W - base - s B0 A0| / |W|.

    Raises:
        UserError: the files hold the matrices in few bits.
    """
    left, waiting = [], {f"{name}.weight": lora for name, lora in adapters_of(model)}
    for _, name, tensor in tensors_of(directory, family_of(model.config)):
        lora = waiting.get(name)
        if lora is None:
            continue
        if not tensor.is_floating_point():
            remedy = "take the unquantised checkpoint, or --adapter.start zero"
            raise UserError(f"start {start} needs the matrices that {directory} holds in few bits", remedy=remedy)
        assert not isinstance(lora, DoRA), "refused by the spec"
        w_OI = tensor.to(lora.lora_A.device, torch.promote_types(lora.lora_A.dtype, torch.float32))
        _begin(lora, w_OI, bits=bits, rounds=(iterations or 1) if start == "loftq" else 0, seed=derive(seed, "start", name))
        left.append(float((w_OI - lora.merged()).norm() / w_OI.norm().clamp(min=1e-30)))
    return sum(left) / len(left)


def plain(model: Model, config: AdapterConfig) -> tuple[dict[str, Tensor], AdapterConfig]:
    """The adapters as a file over the base as published, and the configuration that fits it; a start from zero is left as it is."""
    tensors, started = adapter_tensors(model), [(name, lora) for name, lora in adapters_of(model) if hasattr(lora, "start_A")]
    for name, lora in started:
        a_name, b_name = names_of(name)
        tensors[a_name] = torch.cat([tensors[a_name], lora.get_buffer("start_A")])
        tensors[b_name] = torch.cat([tensors[b_name], -lora.get_buffer("start_B")], 1)
    if not started:
        return tensors, config
    grown = 2**0.5 if config.is_rslora else 2.0
    ranks = {key: 2 * rank for key, rank in config.rank_pattern.items()}
    alphas = {key: grown * alpha for key, alpha in config.alpha_pattern.items()}
    return tensors, replace(config, rank=2 * config.rank, alpha=grown * config.alpha, rank_pattern=ranks, alpha_pattern=alphas)


def _begin(lora: LoRA, w_OI: Tensor, *, bits: str, rounds: int, seed: int) -> None:
    """`rounds` of LoftQ, or PiSSA if there are none."""
    dtype = lora.base.weight.dtype
    part_OI = torch.zeros_like(w_OI) if rounds else _factor(lora, w_OI, seed)
    for _ in range(rounds):
        lora.base = quantised((w_OI - part_OI).to(dtype), bits)
        part_OI = _factor(lora, w_OI - lora.base.dense(w_OI.dtype), seed)
    if not rounds:
        rest_OI = (w_OI - part_OI).to(dtype)
        lora.base = quantised(rest_OI, bits) if bits else Linear.holding(rest_OI)
    lora.register_buffer("start_A", lora.lora_A.detach().clone(), persistent=False)
    lora.register_buffer("start_B", lora.lora_B.detach().clone(), persistent=False)


def _factor(lora: LoRA, matrix_OI: Tensor, seed: int) -> Tensor:
    """Make s B A the best of its rank for the matrix, its weight shared evenly; returns it."""
    rank, smaller = len(lora.lora_A), min(matrix_OI.shape)
    if smaller <= _EXACT:
        u_OR, s_R, vt_RI = torch.linalg.svd(matrix_OI, full_matrices=False)
    else:
        with torch.random.fork_rng([matrix_OI.device] if matrix_OI.is_cuda else []):
            torch.manual_seed(seed)
            u_OR, s_R, v_IR = torch.svd_lowrank(matrix_OI, q=min(rank + _SPARE, smaller), niter=_ROUNDS)
        vt_RI = v_IR.T
    root_R = (s_R[:rank] / lora.scale).sqrt()
    lora.lora_A.copy_(root_R[:, None] * vt_RI[:rank])
    lora.lora_B.copy_(u_OR[:, :rank] * root_R)
    return lora.scale * (lora.lora_B.to(matrix_OI.dtype) @ lora.lora_A.to(matrix_OI.dtype))
