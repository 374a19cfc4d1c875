"""Cross-entropy of logits that become their own gradient: softmax minus one-hot, in the memory of the logits.

With a softcap c (Gemma 2) a logit z counts as c tanh(z / c), and its gradient gets the slope 1 - tanh^2.

Shape suffixes: R rows, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """Of each row, in fp32 or wider: -log p(target), log of the sum of exp, and whether no logit is above the target's."""

    loss_R: Tensor
    logsumexp_R: Tensor
    is_hit_R: Tensor


def cross_entropy_(logits_RV: Tensor, targets_R: Tensor, *, scale: float | Tensor | None, softcap: float | None = None) -> Rows:
    """`scale` [R] or one number multiplies the gradient; with None the logits stay. Every target is in [0, V)."""
    wide_RV = logits_RV.to(torch.promote_types(logits_RV.dtype, torch.float32))
    wide_RV = softcap * torch.tanh(wide_RV / softcap) if softcap else wide_RV
    logsumexp_R, picked_R = wide_RV.logsumexp(1), wide_RV.gather(1, targets_R[:, None]).squeeze(1)
    rows = Rows(logsumexp_R - picked_R, logsumexp_R, picked_R >= wide_RV.amax(1))
    if scale is not None:
        slope_RV = (wide_RV - logsumexp_R[:, None]).exp_()
        slope_RV[torch.arange(len(slope_RV), device=slope_RV.device), targets_R] -= 1
        slope_RV *= 1 - (wide_RV / softcap).square() if softcap else 1
        logits_RV.copy_(slope_RV * (scale[:, None] if isinstance(scale, Tensor) else scale))
    return rows
