"""One LoRA file from several: the weighted sum of their updates, exactly, or the best of a smaller rank.

The sum of w s B A over adapters is one product, of B = [B1 B2 ...] and A = [w1 s1 A1; w2 s2 A2; ...]: ranks add up and nothing is lost.
Asked for rank r, each module's sum is cut to its r strongest directions by an SVD of two triangles no larger than the ranks together;
`lost` is the largest share of a module's update, in norm, that this cut.

Limits: LoRA and rsLoRA; DoRA scales rows by norms that do not add up.
Shape suffixes: O outputs, I inputs, R rank.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from garage.core.errors import UserError
from garage.models.adapters import modules_of, names_of, our_names
from garage.models.config import Config
from garage.store.adapter import AdapterConfig

Read = tuple[AdapterConfig, Mapping[str, Tensor]]


@dataclass(frozen=True)
class Averaged:
    """An adapter, and the largest share of a module's update that a smaller rank cost."""

    config: AdapterConfig
    tensors: Mapping[str, Tensor]
    lost: float


def average(adapters: Sequence[Read], weights: Sequence[float], base: Config, *, rank: int | None = None) -> Averaged:
    """The weighted sum of adapters of one base, at most `rank` wide if that is given; those of weight 0 are left out.

    Raises:
        UserError: one is a DoRA, all weights are 0, or two do not fit each other.
    """
    parts: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for (config, theirs), weight in zip(adapters, weights, strict=True):
        if config.is_dora:
            remedy = "merge each into a model of its own (garage export ... --format merged), or switch between them"
            raise UserError("a DoRA adapter cannot be averaged: its row lengths do not add up", remedy=remedy)
        tensors = our_names(theirs, base)
        for module in modules_of(tensors) if weight else ():
            a_RI, b_OR = (tensors[name].float() for name in names_of(module))
            parts.setdefault(module, []).append((a_RI * (weight * config.scale_of(module)), b_OR))
    if not parts:
        raise UserError("every weight is 0", remedy="give at least one adapter a weight")
    made, lost = {}, [0.0]
    for module, pairs in sorted(parts.items()):
        if len({(a.shape[1], b.shape[0]) for a, b in pairs}) > 1:
            raise UserError(f"the adapters' {module} have different shapes", remedy="average adapters of one base")
        made[module] = torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs], 1)
        if rank is not None and rank < len(made[module][0]):
            made[module], share = _cut(*made[module], rank)
            lost.append(share)
    named = {name: tensor for module, pair in made.items() for name, tensor in zip(names_of(module), pair, strict=True)}
    ranks = {module: len(a) for module, (a, _) in made.items()}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    others = {module: wide for module, wide in ranks.items() if wide != usual}
    first, same = adapters[0][0], {"rank": usual, "alpha": float(usual), "targets": tuple(made)}  # alpha = rank: the scale is in A
    alphas = {module: float(wide) for module, wide in others.items()}
    config = AdapterConfig(base=first.base, revision=first.revision, rank_pattern=others, alpha_pattern=alphas, **same)  # type: ignore[arg-type]
    return Averaged(config, named, max(lost))


def _cut(a_RI: Tensor, b_OR: Tensor, rank: int) -> tuple[tuple[Tensor, Tensor], float]:
    """The best A and B of a smaller rank, and the share of the product's norm that is gone."""
    (q_b, r_b), (q_a, r_a) = torch.linalg.qr(b_OR), torch.linalg.qr(a_RI.T)
    u, s, vt = torch.linalg.svd(r_b @ r_a.T)
    root = s[:rank].sqrt()
    pair = root[:, None] * (vt[:rank] @ q_a.T), (q_b @ u[:, :rank]) * root
    return pair, float(s[rank:].norm() / s.norm().clamp(min=torch.finfo(s.dtype).tiny))
