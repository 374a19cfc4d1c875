"""Optimizers over named float32 tensors: AdamW, AdamW with its state in 8 bits, and Muon for hidden matrices beside AdamW for the rest.

Muon replaces the momentum of a matrix by the nearest matrix whose singular values are about 1, so that every direction learns at the same
pace (Jordan et al. 2024, kellerjordan.github.io/posts/muon). For each hidden matrix W [out, in] with gradient g:

    m <- mu m + (1 - mu) g        u = (1 - mu) g + mu m                                    Nesterov
    X = u / (|u|_F + 1e-7), transposed if out > in
    repeat: A = X X^T, B = b A + c A^2, X <- a X + B X                                     (a, b, c) = (3.4445, -4.7750, 2.0315)
    W <- W (1 - lr wd) - lr sqrt(max(1, out / in)) X

It is meant for the linear layers inside the blocks only. Embeddings, the head, norms and the factors of an adapter go to AdamW. Matrices of
one shape are orthogonalised together. AdamW decays matrices and never vectors.

State is a flat dict of tensors, so that a checkpoint can hold it as safetensors. Limits: the state is float32; with the five iterations
singular values end between .7 and 1.2, except for the smallest, which stay below.
"""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from garage.core.errors import UserError
from garage.kernels import adam8
from garage.kernels.adam8 import Means, Step
from garage.kernels.paths import path
from garage.specs.train import AdamW8Spec, AdamWSpec, MuonSpec, OptimizerSpec
from garage.train.parallel import part_of

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
MOMENTS = ("exp_avg", "exp_avg_sq")
SMALL = 4096  # numbers; a tensor with fewer keeps its means in fp32


class Optimizer(Protocol):
    """Changes tensors by their `.grad`. `step` takes the schedule's factor of the peak learning rate."""

    def step(self, factor: float) -> None: ...

    def state(self) -> dict[str, Tensor]: ...

    def load(self, state: Mapping[str, Tensor]) -> None: ...


class AdamW:
    """Decoupled decay and bias correction as in arXiv 1711.05101; the arithmetic is torch's fused kernel, one pass over memory."""

    def __init__(self, tensors: Mapping[str, Tensor], spec: AdamWSpec) -> None:
        self._tensors, self._lr = dict(tensors), spec.lr
        groups: dict[tuple[float, float], list[Tensor]] = {}
        for name, tensor in tensors.items():
            groups.setdefault(decay_and_ratio(name, tensor, spec), []).append(tensor)
        settings = [{"params": params, "weight_decay": decay, "ratio": ratio} for (decay, ratio), params in groups.items()]
        self._torch = torch.optim.AdamW(settings, lr=spec.lr, betas=(spec.beta1, spec.beta2), eps=spec.eps, fused=True)

    def step(self, factor: float) -> None:
        for group in self._torch.param_groups:
            group["lr"] = self._lr * factor * group["ratio"]
        for tensor in self._tensors.values():
            tensor.grad = _grad(tensor)  # torch skips a tensor without one, and its step count would stay behind
        self._torch.step()

    def state(self) -> dict[str, Tensor]:
        known = self._torch.state
        if not known:
            return {}
        out = {f"adamw.{key}.{name}": known[t][key] for name, t in self._tensors.items() for key in MOMENTS}
        return out | {"adamw.step": known[next(iter(self._tensors.values()))]["step"]}

    def load(self, state: Mapping[str, Tensor]) -> None:
        for name, tensor in self._tensors.items():
            moments = {key: part_of(state[f"adamw.{key}.{name}"], tensor) for key in MOMENTS}
            self._torch.state[tensor] = {"step": state["adamw.step"].to(tensor.device, copy=True), **moments}


class AdamW8:
    """AdamW whose running means are bytes in blocks of 256: 2.03 bytes a weight instead of 8, widened one tensor at a time."""

    def __init__(self, tensors: Mapping[str, Tensor], spec: AdamW8Spec) -> None:
        self._spec, self._steps = spec, torch.zeros(())
        self._large = {name: tensor for name, tensor in tensors.items() if tensor.numel() >= SMALL or tensor.dtype == torch.bfloat16}
        small = {name: tensor for name, tensor in tensors.items() if name not in self._large}
        self._small = AdamW(small, spec) if small else None
        self._means = {name: Means.zero(tensor) for name, tensor in self._large.items()}

    @torch.no_grad()
    def step(self, factor: float) -> None:
        self._steps += 1
        for name, tensor in self._large.items():
            spec, (decay, ratio) = self._spec, decay_and_ratio(name, tensor, self._spec)
            step = Step(spec.lr * factor * ratio, decay, spec.beta1, spec.beta2, spec.eps, float(self._steps))
            kernel = adam8 if tensor.dtype == torch.bfloat16 else path(adam8, tensor)
            self._means[name] = kernel.update(tensor, _grad(tensor), self._means[name], step)
        if self._small is not None:
            self._small.step(factor)

    def state(self) -> dict[str, Tensor]:
        out = {f"adamw8.{key}.{name}": part for name, means in self._means.items() for key, part in means._asdict().items()}
        return out | {"adamw8.step": self._steps} | (self._small.state() if self._small is not None else {})

    def load(self, state: Mapping[str, Tensor]) -> None:
        self._steps = state["adamw8.step"].clone()
        for name, tensor in self._large.items():
            self._means[name] = Means(*(state[f"adamw8.{key}.{name}"].to(tensor.device, copy=True) for key in Means._fields))
        if self._small is not None:
            self._small.load(state)


class Muon:
    """Muon on `hidden`, AdamW on `rest`."""

    def __init__(self, hidden: Mapping[str, Tensor], rest: Mapping[str, Tensor], spec: MuonSpec) -> None:
        self._spec, self._rest = spec, AdamW(rest, spec.adamw) if rest else None
        self._hidden = dict(hidden)
        self._momentum = {name: torch.zeros_like(tensor) for name, tensor in hidden.items()}
        self._shapes: dict[torch.Size, list[str]] = {}
        for name, tensor in hidden.items():
            self._shapes.setdefault(tensor.shape, []).append(name)

    @torch.no_grad()
    def step(self, factor: float) -> None:
        for names in self._shapes.values():
            self._step_alike([self._hidden[name] for name in names], [self._momentum[name] for name in names], self._spec.lr * factor)
        if self._rest is not None:
            self._rest.step(factor)

    def _step_alike(self, weights: list[Tensor], momentum: list[Tensor], lr: float) -> None:
        """One update of matrices that have the same shape."""
        grads, mu = [_grad(weight) for weight in weights], self._spec.momentum
        for m, g in zip(momentum, grads, strict=True):
            m.lerp_(g, 1 - mu)
        update = orthogonalise(torch.stack([g.lerp(m, mu) for m, g in zip(momentum, grads, strict=True)]), self._spec.iterations)
        scale = lr * max(1.0, weights[0].shape[0] / weights[0].shape[1]) ** 0.5
        for weight, change in zip(weights, update, strict=True):
            weight.mul_(1 - lr * self._spec.weight_decay).add_(change, alpha=-scale)

    def state(self) -> dict[str, Tensor]:
        return {f"muon.{name}": m for name, m in self._momentum.items()} | (self._rest.state() if self._rest is not None else {})

    def load(self, state: Mapping[str, Tensor]) -> None:
        for name, momentum in self._momentum.items():
            momentum.copy_(state[f"muon.{name}"])
        if self._rest is not None:
            self._rest.load(state)


def orthogonalise(x: Tensor, iterations: int = 5) -> Tensor:
    """The last two axes of `x` [..., rows, columns] with singular values moved to about 1: bfloat16 products on a GPU, float32 on CPU."""
    dtype, is_tall, (a, b, c) = x.dtype, x.shape[-2] > x.shape[-1], COEFFICIENTS
    x = x.bfloat16() if x.is_cuda else x
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    x = x.mT if is_tall else x
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if is_tall else x).to(dtype)


def split_hidden(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(hidden matrices, the rest): hidden are the weights of linear layers inside the blocks, not adapter factors."""
    hidden = {n: t for n, t in tensors.items() if t.ndim == 2 and ".layers." in f".{n}" and n.endswith("_proj.weight")}
    return hidden, {n: t for n, t in tensors.items() if n not in hidden}


def make_optimizer(tensors: Mapping[str, Tensor], spec: OptimizerSpec) -> Optimizer:
    """The optimizer of `spec` over all `tensors`.

    Raises:
        UserError: Muon is asked for, but no hidden matrix is trained (adapters).
    """
    if isinstance(spec, AdamW8Spec):
        return AdamW8(tensors, spec)
    if isinstance(spec, AdamWSpec):
        return AdamW(tensors, spec)
    hidden, rest = split_hidden(tensors)
    if not hidden:
        raise UserError("Muon trains hidden matrices, and here none is trained", remedy="use --fit.optimizer.kind adamw with an adapter")
    return Muon(hidden, rest, spec)


def shares(tensors: Mapping[str, Tensor], spec: OptimizerSpec) -> str:
    """How many weights are trained, and by what, in words."""
    total = sum(t.numel() for t in tensors.values())
    if isinstance(spec, AdamWSpec):
        return f"{total:,} trained weights, all by AdamW"
    hidden = sum(t.numel() for t in split_hidden(tensors)[0].values())
    return f"{total:,} trained weights, {hidden:,} ({hidden / total:.1%}) by Muon, the rest by AdamW"


def decay_and_ratio(name: str, tensor: Tensor, spec: AdamWSpec) -> tuple[float, float]:
    """The decay of a tensor (matrices only), and its learning rate over the optimizer's (LoRA+ for the B of adapters)."""
    return spec.weight_decay if tensor.ndim >= 2 else 0.0, spec.lora_plus if "lora_B" in name else 1.0


def _grad(weight: Tensor) -> Tensor:
    return weight.grad if weight.grad is not None else torch.zeros_like(weight)
