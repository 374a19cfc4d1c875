"""The gate of the MLP: act(gate) * up, act being silu (SwiGLU) or the tanh form of gelu (GeGLU); Shazeer, arXiv 2002.05202.

The backward saves gate and up and computes the activation again, which is cheaper than a third tensor of MLP width.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def gate(gate_TF: Tensor, up_TF: Tensor, activation: str) -> Tensor:
    """act(gate) * up; `activation` is "silu" or "gelu_tanh"."""
    return _act(gate_TF, activation).mul_(up_TF)


class Gated(torch.autograd.Function):
    """`gate` with gradients for both inputs."""

    @staticmethod
    def forward(ctx: Any, gate_TF: Tensor, up_TF: Tensor, activation: str) -> Tensor:
        ctx.save_for_backward(gate_TF, up_TF)
        ctx.activation = activation
        return gate(gate_TF, up_TF, activation)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        gate_TF, up_TF = ctx.saved_tensors
        return *slopes(grads[0], gate_TF, up_TF, ctx.activation), None


def slopes(dact_TF: Tensor, gate_TF: Tensor, up_TF: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """d(gate) and d(up)."""
    through = dact_TF * up_TF
    if activation == "silu":
        dgate = torch.ops.aten.silu_backward(through, gate_TF)
    else:
        dgate = torch.ops.aten.gelu_backward(through, gate_TF, approximate="tanh")
    return dgate, _act(gate_TF, activation).mul_(dact_TF)


def backward_(dact_TF: Tensor, gate_TF: Tensor, up_TF: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    """`slopes`, and `gate` once more; a faster path writes them over the arguments."""
    return *slopes(dact_TF, gate_TF, up_TF, activation), gate(gate_TF, up_TF, activation)


def _act(x: Tensor, activation: str) -> Tensor:
    return F.silu(x) if activation == "silu" else F.gelu(x, approximate="tanh")
