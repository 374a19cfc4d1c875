"""The gate of the MLP: act(gate) * up, act being silu (SwiGLU) or the tanh form of gelu (GeGLU); Shazeer, arXiv 2002.05202.

The backward saves gate and up and computes the activation again, which is cheaper than a third tensor of MLP width. The gradient it is
given becomes that of the gate in place, so that four tensors of MLP width are alive and not six.

Limit: what takes the result must hand a gradient of its own making back, as a product does, and not one it shares (as an addition does).
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def gate(gate_TF: Tensor, up_TF: Tensor, activation: str) -> Tensor:
    """act(gate) * up; `activation` is "silu" or "gelu_tanh"."""
    return _act(gate_TF, activation).mul_(up_TF)


class Gated(torch.autograd.Function):
    """`gate` of `ops`, this module or its twin, with gradients for both inputs."""

    @staticmethod
    def forward(ctx: Any, gate_TF: Tensor, up_TF: Tensor, activation: str, ops: Any) -> Tensor:
        ctx.save_for_backward(gate_TF, up_TF)
        ctx.activation, ctx.ops = activation, ops
        return ops.gate(gate_TF, up_TF, activation)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        gate_TF, up_TF = ctx.saved_tensors
        return *ctx.ops.slopes(grads[0], gate_TF, up_TF, ctx.activation), None, None


def slopes(dact_TF: Tensor, gate_TF: Tensor, up_TF: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """d(gate), in the memory of `dact_TF`, and d(up)."""
    dup = _act(gate_TF, activation).mul_(dact_TF)
    dgate = dact_TF.contiguous().mul_(up_TF)  # one that is spread out by strides has no memory of its own
    if activation == "silu":
        torch.ops.aten.silu_backward.grad_input(dgate, gate_TF, grad_input=dgate)
    else:
        torch.ops.aten.gelu_backward.grad_input(dgate, gate_TF, approximate="tanh", grad_input=dgate)
    return dgate, dup


def _act(x: Tensor, activation: str) -> Tensor:
    return F.silu(x) if activation == "silu" else F.gelu(x, approximate="tanh")
