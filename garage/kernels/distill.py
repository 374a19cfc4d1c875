"""Distillation through two linear heads, chunk by chunk: the T x V logits of neither the student nor the teacher exist.

With p the teacher's and q the student's softmax of logits / tau, m = (p + q) / 2, and CE the negative log-likelihood of the target at
tau = 1, the loss of a row is (1 - mix) CE + mix tau^2 D:

    forward    D = KL(p || q)                           d(logits) = tau (q - p)                  Hinton et al., arXiv 1503.02531
    reverse    D = KL(q || p)                           d(logits) = tau q (g - sum(q g)), g = log q - log p
    js         D = KL(p || m) / 2 + KL(q || m) / 2      the same with g = (log q - log m) / 2    GKD, arXiv 2306.13649

tau^2 keeps the size of the gradient when tau changes. As in `kernels.loss`, rows without a target are dropped first, each chunk turns its
logits into their gradient at once, and the backward only multiplies by the upstream number. The teacher gets no gradient.

Limits: fp32 arithmetic within a chunk, whatever the dtype of the hidden states (fp64 for fp64), so about six chunks of logits live;
both heads must have the same rows: pass slices where one is padded.
Shape suffixes: T packed tokens, R rows that count, D model width of either model, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from garage.kernels.linear import Weight
from garage.kernels.loss import Head, counted, rows_per_chunk

Divergence = Literal["forward", "reverse", "js"]


@dataclass(frozen=True)
class Match:
    """What is compared, and how much it counts beside the targets."""

    divergence: Divergence = "forward"
    temperature: float = 1.0
    mix: float = 0.5


@dataclass(frozen=True)
class DistillLoss:
    """Sums over the rows that count: `loss` (differentiable), its parts `nll` and `divergence` (before weighting), and how many rows the
    argmax of the student got right (`correct`) and shares with the teacher (`agreed`)."""

    loss: Tensor
    nll: Tensor
    divergence: Tensor
    correct: Tensor
    agreed: Tensor
    count: int


def distilled(
    hidden_TD: Tensor, weight_VD: Weight, teacher_TD: Tensor, teacher_VD: Tensor, targets_T: Tensor,
    *, match: Match, chunk: int | None = None,
) -> DistillLoss:  # fmt: skip
    """The summed loss of a student's hidden states and head against a teacher's; a target of -100 is not counted."""
    hidden_RD, targets_R, rows = counted(hidden_TD, targets_T)
    teacher_RD = teacher_TD if rows is None else teacher_TD.index_select(0, rows)
    trains = tuple(torch.is_grad_enabled() and tensor.requires_grad for tensor in (hidden_RD, weight_VD))
    size = rows_per_chunk(weight_VD, chunk)
    given = (hidden_RD, weight_VD, teacher_RD.detach(), teacher_VD.detach(), targets_R)
    loss, nll, divergence, correct, agreed = _Distilled.apply(*given, match, size, trains)  # type: ignore[no-untyped-call]
    return DistillLoss(loss, nll, divergence, correct, agreed, len(targets_R))


def compared(student_RV: Tensor, teacher_RV: Tensor, match: Match) -> tuple[Tensor, Tensor]:
    """The divergence of each row [R], and d(tau^2 divergence) / d(logits) [R, V]."""
    tau = match.temperature
    log_q, log_p = (torch.log_softmax(logits / tau, -1) for logits in (student_RV, teacher_RV))
    q = log_q.exp()
    if match.divergence == "forward":
        p = log_p.exp()
        return (p * (log_p - log_q)).sum(-1), q.sub_(p).mul_(tau)
    g = log_q - log_p
    if match.divergence == "reverse":
        far = (q * g).sum(-1)
        return far, q.mul_(g.sub_(far[:, None])).mul_(tau)
    log_m = torch.logaddexp(log_q, log_p).sub_(torch.log(log_q.new_tensor(2.0)))
    g = (log_q - log_m) / 2
    half = (q * g).sum(-1)
    divergence = half + (log_p.exp() * (log_p - log_m)).sum(-1) / 2
    return divergence, q.mul_(g.sub_(half[:, None])).mul_(tau)


class _Distilled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_RD: Tensor, weight_VD: Weight, teacher_RD: Tensor, teacher_VD: Tensor, targets_R: Tensor, *rest: Any
    ) -> tuple[Tensor, ...]:
        match, chunk, trains = rest
        head = Head(hidden_RD, weight_VD, trains_hidden=trains[0], trains_weight=trains[1])
        wide = torch.promote_types(hidden_RD.dtype, torch.float32)
        teacher_VD, sums = teacher_VD.to(teacher_RD.dtype), torch.zeros(4, dtype=wide, device=hidden_RD.device)
        for start in range(0, len(targets_R), chunk):
            rows = slice(start, min(start + chunk, len(targets_R)))
            student, teacher = head.logits(hidden_RD[rows], start).to(wide), (teacher_RD[rows] @ teacher_VD.T).to(wide)
            sums += _chunk(head, rows, hidden_RD[rows], (student, teacher, targets_R[rows, None]), match)
        ctx.head = head.settled()
        nll, divergence, correct, agreed = sums
        loss = (1 - match.mix) * nll + match.mix * match.temperature**2 * divergence
        ctx.mark_non_differentiable(nll, divergence, correct, agreed)
        return loss, nll, divergence, correct, agreed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.head.gradients(grads[0]), *(None,) * 6


def _chunk(head: Head, rows: slice, hidden_RD: Tensor, parts: tuple[Tensor, Tensor, Tensor], match: Match) -> Tensor:
    """The four sums of some rows; their gradients go to `head`."""
    student_RV, teacher_RV, target = parts
    divergence_R, dlogits_RV = compared(student_RV, teacher_RV, match)
    logp_RV, first = torch.log_softmax(student_RV, -1), student_RV.argmax(-1)
    nll, agreed, correct = -logp_RV.gather(1, target).sum(), (first == teacher_RV.argmax(-1)).sum(), (first == target[:, 0]).sum()
    if head.is_training:
        slope_RV = logp_RV.exp_().scatter_add_(1, target, torch.full_like(target, -1, dtype=logp_RV.dtype))
        head.add(rows, dlogits_RV.mul_(match.mix).add_(slope_RV, alpha=1 - match.mix), hidden_RD)
    return torch.stack([nll, divergence_R.sum(), correct.to(nll), agreed.to(nll)])
