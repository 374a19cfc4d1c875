"""Distillation: learn a teacher's probabilities over all tokens beside the answers in the rows (the kernel has the formulas).

The teacher reads the same pass as the student, in evaluation mode and without gradients. Both are compared at the learned places only.
The held-out loss is the same mixture, so that the best checkpoint is the one nearest to what is asked for.

Shape suffixes: T packed tokens, D model width.
"""

from typing import ClassVar

import torch
from torch import Tensor

from garage.kernels.distill import DistillLoss, Match, distilled
from garage.models.layers import Model
from garage.train.batches import Micro


class Distillation:
    """The objective; the two vocabularies agree, and rows that only one head has (padding) are left out of both."""

    group: ClassVar[int] = 1

    def __init__(self, teacher: Model, match: Match, chunk: int | None) -> None:
        self._teacher, self._match, self._chunk = teacher.eval().requires_grad_(False), match, chunk
        self._seen: list[Tensor] = []

    def loss(self, model: Model, micro: Micro) -> Tensor:
        found = self._compare(model, micro)
        self._seen.append(torch.stack([found.nll, found.divergence, found.agreed, found.nll.new_tensor(found.count)]).detach())
        return found.loss

    def score(self, model: Model, micro: Micro) -> tuple[float, int]:
        found = self._compare(model, micro)
        return float(found.loss), int(found.correct)

    def metrics(self) -> dict[str, float]:
        """Per learned token: cross-entropy, divergence from the teacher in nats, and how often both would say the same."""
        nll, divergence, agreed, count = torch.stack(self._seen).sum(0).tolist()
        self._seen = []
        return {"cross_entropy": nll / count, "divergence": divergence / count, "agreement": agreed / count}

    def _compare(self, model: Model, micro: Micro) -> DistillLoss:
        packed = micro.packed
        student_TD, (teacher_TD, teacher_VD) = model(packed.tokens_T, packed.positions_T, packed.attend()), self._taught(micro)
        student_VD = model.lm_head.weight
        rows = min(len(student_VD), len(teacher_VD))
        return distilled(
            student_TD, student_VD[:rows], teacher_TD, teacher_VD[:rows], micro.targets_T, match=self._match, chunk=self._chunk
        )

    @torch.no_grad()
    def _taught(self, micro: Micro) -> tuple[Tensor, Tensor]:
        packed = micro.packed
        return self._teacher(packed.tokens_T, packed.positions_T, packed.attend()), self._teacher.lm_head.weight
