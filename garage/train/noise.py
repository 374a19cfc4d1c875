"""NEFTune: noise on the input embeddings while training, against answers learned word for word (arXiv 2310.05914).

Each number of a document's embeddings gets noise drawn evenly from -1 to 1, times alpha / sqrt(L D), where L is the length of that document
in the pack and D the model's width. It is added where the first block takes its input, so after a family has scaled its embeddings, and
outside what is recomputed in the backward. Evaluation and the reference of a preference see none. The draws come from torch's generator,
whose state is part of a checkpoint.

Limits: how rows are packed decides who gets which draw, so with noise (as with dropout) `micro_tokens` changes figures within chance.
Shape suffixes: T packed tokens, D model width.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from garage.models.attend import PackedAttend
from garage.models.layers import Angles, Model


@contextmanager
def noised(model: Model, alpha: float) -> Iterator[None]:
    """Inside, every pass of `model` in training mode gets noise of strength `alpha`; 0 is none."""

    def disturb(_: nn.Module, inputs: tuple[Tensor, Angles, PackedAttend]) -> tuple[object, ...] | None:
        x_TD, angles, attend = inputs
        return (x_TD + noise_like(x_TD, attend.bounds, alpha), angles, attend) if model.training else None

    hook = model.model.layers[0].register_forward_pre_hook(disturb) if alpha else None
    try:
        yield
    finally:
        if hook is not None:
            hook.remove()


def noise_like(x_TD: Tensor, bounds: tuple[int, ...], alpha: float) -> Tensor:
    """The noise of one pass."""
    lengths = torch.tensor(bounds).diff()
    bound_T = (alpha / (lengths * x_TD.shape[-1]) ** 0.5).repeat_interleave(lengths)
    return torch.empty_like(x_TD).uniform_(-1, 1) * bound_T[:, None].to(x_TD)
