"""Maximum likelihood of the next token: the objective of pretraining and of supervised fine-tuning.

They are one objective, because the mask is data: in a pretraining dataset every token is learned, in a conversation those of the assistant.
Places without a learned target cost no head at all.

`Objective` is what the loop asks of any objective. Losses are sums; the loop divides by the number of what is counted in the step.
"""

from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor

from garage.kernels.loss import HeadLoss, linear_cross_entropy
from garage.models.layers import Model
from garage.train.batches import Micro


class Objective(Protocol):
    """How a batch becomes a number to lower. `group` is how many rows belong together; sums are over learned tokens, or over groups.

    A pass may be without rows; its loss is 0, with a gradient of 0. `score` and `loss` are of the passes of this process; `metrics` is
    called by all processes together and says the same on each."""

    group: ClassVar[int]

    def loss(self, model: Model, micro: Micro) -> Tensor:
        """The summed loss of a pass, to be differentiated."""

    def score(self, model: Model, micro: Micro) -> tuple[float, int]:
        """For held-out rows: the summed loss, and how many of what is counted the model gets right."""

    def metrics(self) -> dict[str, float]:
        """What else the passes since the last call showed."""


@dataclass(frozen=True)
class Likelihood:
    """Negative log-likelihood in nats; `chunk` rows of logits are alive at once (None: the kernel chooses)."""

    group: ClassVar[int] = 1
    chunk: int | None

    def loss(self, model: Model, micro: Micro) -> Tensor:
        return self._head(model, micro).loss

    def score(self, model: Model, micro: Micro) -> tuple[float, int]:
        head = self._head(model, micro)
        return float(head.loss), int(head.correct)

    def metrics(self) -> dict[str, float]:
        return {}

    def _head(self, model: Model, micro: Micro) -> HeadLoss:
        packed = micro.packed
        hidden_TD = model(packed.tokens_T, packed.positions_T, packed.attend())
        return linear_cross_entropy(hidden_TD, model.lm_head.weight, micro.targets_T, chunk_rows=self.chunk)
