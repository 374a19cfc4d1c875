"""Decoder layers that keep nothing but their input: one autograd Function for a layer (Chen et al., arXiv 1604.06174).

The forward runs the layer without a graph. The backward runs the half with attention again, with one; then, tile by tile of its tokens, the
half with the MLP forward and backward at once; then back through the first half. So the MLP runs twice in all, where checkpoints around
both halves run it three times, and what is MLP-wide exists for one tile. Gradients of weights are added where they belong at once.

The input may wait in the memory of the host. The random state is kept where something is drawn (dropout), so the gradients are those
of the plain layer: the same bits without tiles, the same up to rounding with them.

Limits: the copies to and from the host are ordered with the computation, not hidden behind it; no gradient of a gradient.
Shape suffixes: T packed tokens, D model width.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from garage.models.layers import Angles, Attend, Block


@dataclass(frozen=True)
class Thrift:
    """How a layer saves memory: tokens of the MLP at a time (None: all), and whether its input waits in the host's memory."""

    tile: int | None = None
    is_offloaded: bool = False


@contextmanager
def recomputed(blocks: Sequence[nn.Module], thrift: Thrift) -> Iterator[None]:
    """Inside, these blocks keep their input alone."""
    for block in blocks:
        assert isinstance(block, Block), type(block)
        block.forward = partial(_call, block, thrift)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _call(block: Block, thrift: Thrift, x_TD: Tensor, angles: Angles, attend: Attend) -> Tensor:
    if not torch.is_grad_enabled():
        return type(block).forward(block, x_TD, angles, attend)
    anchor = torch.empty(0, device=x_TD.device, requires_grad=True)  # the first input may need no gradient, and its layer does
    return _Layer.apply(x_TD, anchor, block, thrift, angles, attend)  # type: ignore[no-any-return, no-untyped-call]


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, anchor: Tensor, block: Block, thrift: Thrift, angles: Angles, attend: Attend) -> Tensor:
        ctx.block, ctx.thrift, ctx.angles, ctx.attend = block, thrift, angles, attend
        ctx.random = _random_state(block, x_TD.device)
        x2_TD = block.mix(x_TD, angles, attend)
        if thrift.is_offloaded:
            ctx.waiting = _to_host(x_TD)
        else:
            ctx.save_for_backward(x_TD)
        if thrift.tile is None:
            return block.feed(x2_TD)
        for rows in _tiles(x2_TD, thrift.tile):
            x2_TD[rows] = block.feed(x2_TD[rows])
        return x2_TD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        waiting = ctx.waiting if ctx.thrift.is_offloaded else ctx.saved_tensors[0]
        x_TD = waiting.to(grads[0].device, non_blocking=True).contiguous()
        x_TD = x_TD.detach().requires_grad_(ctx.needs_input_grad[0])
        with torch.enable_grad(), _as_in(ctx.random, x_TD.device):
            _back(ctx.block, ctx.thrift.tile, grads[0], (x_TD, ctx.angles, ctx.attend))
        return x_TD.grad, *[None] * 5


def _back(block: Block, tile: int | None, dy_TD: Tensor, inputs: tuple[Tensor, Angles, Attend]) -> None:
    """Forward and backward of a layer; the gradients are added to its weights' and its input's `.grad`."""
    x2_TD = block.mix(*inputs)
    edge, x2_TD = get_gradient_edge(x2_TD), x2_TD.detach()
    if tile is None:
        dx2_TD = _through(block, x2_TD, dy_TD)
    else:
        dx2_TD = torch.empty_like(x2_TD)
        for rows in _tiles(x2_TD, tile):
            dx2_TD[rows] = _through(block, x2_TD[rows], dy_TD[rows])
    del x2_TD
    torch.autograd.backward([edge], [dx2_TD])


def _through(block: Block, x_TD: Tensor, dy_TD: Tensor) -> Tensor:
    """The gradient of the MLP half's input. A function of its own, so that nothing of a tile outlives it."""
    x_TD = x_TD.detach().requires_grad_()
    torch.autograd.backward([block.feed(x_TD)], [dy_TD])
    assert x_TD.grad is not None
    return x_TD.grad


def _tiles(x_TD: Tensor, tile: int) -> list[slice]:
    return [slice(first, first + tile) for first in range(0, len(x_TD), tile)]


def _to_host(x_TD: Tensor) -> Tensor:
    """A copy in memory that the GPU can reach; nothing on `meta`, where only the device is counted."""
    if x_TD.is_meta:
        return x_TD.new_empty(1, 1).expand(x_TD.shape)
    return torch.empty(x_TD.shape, dtype=x_TD.dtype, pin_memory=True).copy_(x_TD, non_blocking=True)


def _random_state(block: nn.Module, device: torch.device) -> tuple[Tensor, ...] | None:
    """The generators' states before a layer that draws."""
    if not any(module.training and getattr(module, "dropout", 0.0) for module in block.modules()):
        return None
    return (torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else []))


@contextmanager
def _drawing_as(states: tuple[Tensor, ...], device: torch.device) -> Iterator[None]:
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.set_rng_state(states[0])
        if len(states) > 1:
            torch.cuda.set_rng_state(states[1], device)
        yield


def _as_in(states: tuple[Tensor, ...] | None, device: torch.device) -> Any:
    return nullcontext() if states is None else _drawing_as(states, device)
