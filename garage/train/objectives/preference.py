"""Preferences: make a better answer more likely than a worse one to the same prompt, without a reward model.

With the sums s(y) = log pi(y) over the tokens of an answer, r(y) = s(y) - s_ref(y), w the better answer and l the worse one:

    sigmoid   -(1 - e) log sigma(beta (r(w) - r(l))) - e log sigma(-beta (r(w) - r(l)))        DPO, arXiv 2305.18290; e = smoothing
    robust    ((1 - e) L(w, l) - e L(l, w)) / (1 - 2 e) with L of the above at e = 0           arXiv 2403.00409
    length    as sigmoid, r divided by the number of tokens                                    Tulu 3, arXiv 2411.15124
    ipo       (r(w)/|w| - r(l)/|l| - 1 / (2 beta))^2                                           IPO, arXiv 2310.12036
    simpo     -log sigma(beta (s(w)/|w| - s(l)/|l|) - gamma)                                   SimPO, arXiv 2405.14734
    + rpo * (-s(w) / |w|)                                                                      RPO, arXiv 2404.19733

A pair is two rows in one pass, the better one first. The reference's sums are computed once, before the first update, by the very model
that is then trained, so no second model is held.

Watch `chosen_change`, the mean of r(w): below 0 the better answer itself becomes less likely, and quality falls while every other
figure looks well.

Shape suffixes: T packed tokens, B rows, P pairs.
"""

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from garage.kernels.loss import IGNORED, linear_log_probs
from garage.models.layers import Model
from garage.specs.train import FitSpec, PreferenceSpec
from garage.store.dataset import Encoded
from garage.train.batches import Micro, read_batches
from garage.train.parallel import add_up, totals


class Preference:
    """The objective over pairs; `train` and `held` are the reference's sums of every row of the two splits (unused by simpo)."""

    group: ClassVar[int] = 2

    def __init__(self, settings: PreferenceSpec, chunk: int | None, *, train: Tensor | None = None, held: Tensor | None = None) -> None:
        self._settings, self._chunk, self._train, self._held = settings, chunk, train, held
        self._seen: list[Tensor] = []

    def loss(self, model: Model, micro: Micro) -> Tensor:
        loss_P, rewards_BP = self._pairs(model, micro, self._train)
        self._seen.append(rewards_BP)
        return loss_P.sum()

    def score(self, model: Model, micro: Micro) -> tuple[float, int]:
        loss_P, rewards_BP = self._pairs(model, micro, self._held)
        return float(loss_P.sum()), int((rewards_BP[0] > rewards_BP[1]).sum())

    def metrics(self) -> dict[str, float]:
        """Rewards beta * r of both answers, their margin, how often it is positive, and the change of the better answer in nats."""
        rewards_BP, self._seen = torch.cat(self._seen, 1), []
        *sums, count = totals(*rewards_BP.sum(1).tolist(), float((rewards_BP[0] > rewards_BP[1]).sum()), rewards_BP.shape[1])
        beta, (chosen, rejected, preferred) = self._settings.beta, (value / count for value in sums)
        rewards = {"reward_chosen": beta * chosen, "reward_rejected": beta * rejected, "margin": beta * (chosen - rejected)}
        return {**rewards, "preferred": preferred} | ({} if self._train is None else {"chosen_change": chosen})

    def _pairs(self, model: Model, micro: Micro, reference_B: Tensor | None) -> tuple[Tensor, Tensor]:
        """The loss of each pair, and what it compares (r, per token where the kind says so, or s for simpo) of both its rows."""
        sums_B, counts_B = row_log_probs(model, micro, self._chunk)
        base_B = torch.zeros_like(sums_B) if reference_B is None else reference_B[micro.rows].to(sums_B)
        is_mean = self._settings.kind in ("ipo", "length", "simpo")
        rewards_BP = ((sums_B - base_B) / (counts_B if is_mean else 1)).view(len(sums_B) // 2, 2).T
        likelihood_P = (sums_B / counts_B)[::2]
        loss_P = pair_loss(rewards_BP[0] - rewards_BP[1], self._settings) - self._settings.rpo * likelihood_P
        return loss_P, rewards_BP.detach()


def pair_loss(margin_P: Tensor, settings: PreferenceSpec) -> Tensor:
    """The loss of each pair from what the better answer is ahead by."""
    beta, e = settings.beta, settings.smoothing
    if settings.kind == "ipo":
        return (margin_P - 0.5 / beta).square()
    if settings.kind == "simpo":
        return -logsigmoid(beta * margin_P - (0.5 if settings.gamma is None else settings.gamma))
    right_P, wrong_P = -logsigmoid(beta * margin_P), -logsigmoid(-beta * margin_P)
    if settings.kind == "robust":
        return ((1 - e) * right_P - e * wrong_P) / (1 - 2 * e)
    return (1 - e) * right_P + e * wrong_P


def row_log_probs(model: Model, micro: Micro, chunk: int | None) -> tuple[Tensor, Tensor]:
    """Of each row of a pass: the summed log-probability of its learned tokens, in nats, and how many they are."""
    packed = micro.packed
    hidden_TD = model(packed.tokens_T, packed.positions_T, packed.attend())
    log_probs_T = linear_log_probs(hidden_TD, model.lm_head.weight, micro.targets_T, chunk_rows=chunk)
    lengths = packed.bounds.diff().long().to(log_probs_T.device)
    row_T = torch.arange(len(lengths), device=log_probs_T.device).repeat_interleave(lengths)
    rows, is_learned_T = len(micro.rows), (micro.targets_T != IGNORED).to(log_probs_T)
    sums_B, counts_B = (log_probs_T.new_zeros(len(lengths)).index_add(0, row_T, values) for values in (log_probs_T, is_learned_T))
    return sums_B[:rows], counts_B[:rows]


@torch.no_grad()
def reference_log_probs(model: Model, data: Encoded, spec: FitSpec) -> Tensor:
    """The summed log-probability of every row under the model as it is now; 0 for rows that no pair uses."""
    device = next(model.parameters()).device
    sums_B = torch.zeros(len(data))
    for step in read_batches(data, spec, device, batch_tokens=spec.micro_tokens, group=2).in_order():
        for micro in step.micros:
            sums_B[micro.rows] = row_log_probs(model, micro, spec.loss_chunk)[0].float().cpu()
    return add_up(sums_B)
