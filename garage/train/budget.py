"""What a training step takes, to the byte, before it runs: the very step, on `meta` tensors, under the byte counter.

Nothing is estimated by formula but the optimizer's state, which is there between steps. What no counter of tensors sees is `process`: the
interpreter and its libraries on a CPU, the context of a GPU.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import psutil
import torch
from torch import Tensor, nn

from garage.kernels.dispatch import meta_stands_for
from garage.models.adapters import norms_held
from garage.models.batch import PackedBatch
from garage.models.layers import Model
from garage.models.recompute import Thrift, recomputed
from garage.specs.train import AdamW8Spec, AdamWSpec, FitSpec, OptimizerSpec
from garage.train.batches import MULTIPLE, Micro
from garage.train.bytes import ByteCounter
from garage.train.objectives.likelihood import Likelihood
from garage.train.optim import SMALL, split_hidden

CUDA_CONTEXT = 500_000_000  # context, cuBLAS and the allocator's waste; an estimate
KEPT, LOSS, WORK = "activations kept", "loss", "work of the backward"


@dataclass(frozen=True)
class Budget:
    """Bytes by item at the moment when most is alive, and the products' arithmetic."""

    items: Mapping[str, int]
    flop: int

    @property
    def total(self) -> int:
        return sum(self.items.values())

    @property
    def tensors(self) -> int:
        """All of it but what no tensor holds."""
        return self.total - self.items["process"]


def step_budget(model: Model, fit: FitSpec, *, device: str, layers: int) -> Budget:
    """One step of the model's twin on `meta`, standing for "cpu" or "cuda", with `layers` of its layers computed again."""
    return counted_step(model if next(model.parameters()).is_meta else meta_twin(model), fit, device=device, layers=layers)


def counted_step(model: Model, fit: FitSpec, *, device: str, layers: int) -> Budget:
    """The same of the model itself; the gradients stay in its weights."""
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    resident = list({id(t): t for t in (*model.parameters(), *model.buffers())}.values())
    with ByteCounter(resident) as counter, meta_stands_for(device):
        _step(model, fit, counter, layers)
    gradients = counter.born_by_peak(weight.grad for weight in trained.values())
    peak = {KEPT: 0, LOSS: 0, WORK: 0} | dict(counter.at_peak)
    peak[WORK] -= gradients
    moved = _size(trained.values())
    items = {
        "weights": _size(resident) - moved, "trained weights": moved, "optimizer": optimizer_bytes(trained, fit.optimizer),
        "gradients": gradients, **peak, "process": CUDA_CONTEXT if device == "cuda" else psutil.Process().memory_info().rss,
    }  # fmt: skip
    return Budget(items, counter.flop)


def layers_to_recompute(model: Model, fit: FitSpec, free: int, *, device: str = "") -> int:
    """How many layers must keep their input alone for a step to fit into `free` bytes beside what is there already.

    `device` is what a model on `meta` stands for."""
    count, device = len(model.model.layers), device or next(model.parameters()).device.type
    if fit.checkpointing != "auto" or device == "meta" or fit.sharding == "full":
        return count if fit.checkpointing == "all" else 0
    twin = model if next(model.parameters()).is_meta else meta_twin(model)
    needs = [needed(step_budget(twin, fit, device=device, layers=layers)) for layers in (0, count)]
    if needs[0] <= free:
        return 0
    share = (needs[0] - free) / max(1, needs[0] - needs[1])
    return min(count, -int(-share * count // 1))


def meta_twin(model: Model) -> Model:
    """The same model without its numbers."""
    memo: dict[int, object] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        empty = tensor.detach().to("meta")
        memo[id(tensor)] = nn.Parameter(empty, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(model, memo)


def optimizer_bytes(trained: Mapping[str, Tensor], spec: OptimizerSpec) -> int:
    """Of the state kept between steps."""
    if isinstance(spec, AdamW8Spec):
        large = [tensor for tensor in trained.values() if tensor.numel() >= SMALL or tensor.dtype == torch.bfloat16]
        small = sum(tensor.numel() for tensor in trained.values()) - sum(tensor.numel() for tensor in large)
        return 8 * small + sum(2 * tensor.numel() + 8 * -(-tensor.numel() // 256) for tensor in large)
    count = sum(tensor.numel() for tensor in trained.values())
    return 8 * count if isinstance(spec, AdamWSpec) else 8 * count - 4 * sum(tensor.numel() for tensor in split_hidden(trained)[0].values())


def _step(model: Model, fit: FitSpec, counter: ByteCounter, layers: int) -> None:
    """A pass with as many rows of the greatest length as fit, all of it learned."""
    counter.phase = KEPT
    tokens = -(-fit.micro_tokens // MULTIPLE) * MULTIPLE
    bounds = [*range(0, tokens, fit.max_length), tokens]
    ids = torch.zeros(tokens, dtype=torch.int64, device=next(model.parameters()).device)
    micro = Micro(PackedBatch(ids, ids, torch.tensor(bounds, dtype=torch.int32)), ids, tokens, np.zeros(1))
    model.compute_dtype = getattr(torch, fit.dtype)
    model.train()

    def loss_begins(*_: object) -> None:
        counter.phase = LOSS

    hook = model.model.norm.register_forward_hook(loss_begins)
    with recomputed(list(model.model.layers)[:layers], Thrift(fit.tile, fit.offload)), norms_held(model):
        loss = Likelihood(fit.loss_chunk).loss(model, micro)
        hook.remove()
        counter.phase = WORK
        loss.backward()  # type: ignore[no-untyped-call]


def needed(budget: Budget) -> int:
    """What has to be free before the first step of a loaded model."""
    return budget.total - sum(budget.items[name] for name in ("weights", "trained weights", "process"))


def _size(tensors: object) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)  # type: ignore[attr-defined]
