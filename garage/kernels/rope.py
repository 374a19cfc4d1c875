"""Rotary positions (Su et al., arXiv 2104.09864) in halves, with a backward that turns the other way and saves only the angles.

The angles are computed in fp32 and cast to the activation dtype once per forward, as transformers does, so no fp32 copy of the
queries is made. Channel j turns with channel j + H/2, not with its neighbour.
"""

from typing import Any

import torch
from torch import Tensor


def turn(x_TNH: Tensor, cos_TH: Tensor, sin_TH: Tensor, sign: float = 1.0) -> Tensor:
    """Turn by the angles (sign 1) or back (sign -1). `cos_TH` and `sin_TH` hold H/2 angles in x's dtype."""
    cos, sin = cos_TH[:, None], sin_TH[:, None]
    out = torch.empty_like(x_TNH)
    (a, b), (first, second) = x_TNH.chunk(2, dim=-1), out.chunk(2, dim=-1)
    torch.mul(a, cos, out=first).addcmul_(b, sin, value=-sign)
    torch.mul(b, cos, out=second).addcmul_(a, sin, value=sign)
    return out


class Rotate(torch.autograd.Function):
    """`turn` of `ops`, this module or its twin, with a gradient for x."""

    @staticmethod
    def forward(ctx: Any, x_TNH: Tensor, cos_TH: Tensor, sin_TH: Tensor, ops: Any) -> Tensor:
        ctx.save_for_backward(cos_TH, sin_TH)
        ctx.ops = ops
        return ops.turn(x_TNH, cos_TH, sin_TH)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        cos_TH, sin_TH = ctx.saved_tensors
        return ctx.ops.turn(grads[0], cos_TH, sin_TH, -1.0), None, None, None
