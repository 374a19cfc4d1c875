"""Trained weights in float32, matrix products in the precision of the run.

Updates are a thousandth of a weight or less; bfloat16 has eight bits and would round most of them away. So each trained weight is
kept twice: the float32 master, which the optimizer changes and checkpoints hold, and the copy the model computes with. Gradients are
added up in float32 over the micro-batches of a step, each as soon as it is complete, so that no second set of them is ever alive.
In float32 the two are the same tensor and nothing is copied. Frozen weights are cast once and have no master.

Source: Micikevicius et al., Mixed Precision Training, arXiv 1710.03740 (bfloat16 needs no loss scaling).
"""

from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class Masters:
    """The float32 masters of a model's trained weights, by name; each carries its gradient in `.grad`."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._copies: list[tuple[nn.Parameter, Tensor]] = []
        self._hooks: list[RemovableHandle] = []
        for name, weight in model.named_parameters():
            if not weight.requires_grad:
                weight.data = weight.data.to(dtype) if weight.is_floating_point() else weight.data
                continue
            master = weight.data.float()
            weight.data = master.to(dtype)
            self.tensors[name] = weight if weight.dtype == torch.float32 else master
            if weight.dtype != torch.float32:
                self._copies.append((weight, master))
                self._hooks.append(weight.register_post_accumulate_grad_hook(partial(_collect, master)))

    def spread(self) -> None:
        """Copy the masters into the weights the model computes with; call it after every change of a master."""
        for weight, master in self._copies:
            weight.data.copy_(master)

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take over values for all masters."""
        for name, master in self.tensors.items():
            master.data.copy_(tensors[name])
        self.spread()

    def drop_gradients(self) -> None:
        for master in self.tensors.values():
            master.grad = None

    def release(self) -> None:
        """End of training: the trained weights of the model become the float32 masters themselves."""
        for hook in self._hooks:
            hook.remove()
        for weight, master in self._copies:
            weight.data, weight.grad = master.data, None
        self._copies, self._hooks = [], []
        self.drop_gradients()


def _collect(master: Tensor, weight: nn.Parameter) -> None:
    """Move a finished gradient to its master."""
    if weight.grad is None:
        return
    if master.grad is None:
        master.grad = weight.grad.float()
    else:
        master.grad.add_(weight.grad)
    weight.grad = None
