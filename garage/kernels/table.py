"""Rows of a trained table, whose gradient is as large as the table: a second one is never made beside the one that is there.

Autograd adds a whole new gradient to `.grad`. Here the backward of a parameter that has a gradient of this step adds what is new in place
and returns nothing. So `torch.autograd.grad` finds nothing for a parameter whose `.grad` is set.

Shape suffixes: T packed tokens, V vocabulary, D model width.
"""

from typing import Any

import torch
from torch import Tensor


def gradient_of(weight: object, dtype: torch.dtype) -> Tensor | None:
    """What the gradient of a parameter is so far in this step, if something in `dtype` can be added to it."""
    grad = weight.grad if isinstance(weight, Tensor) and weight.is_leaf else None
    return grad if grad is not None and grad.dtype == dtype else None


class Lookup(torch.autograd.Function):
    """weight_VD[tokens_T]"""

    @staticmethod
    def forward(ctx: Any, tokens_T: Tensor, weight_VD: Tensor) -> Tensor:
        ctx.save_for_backward(tokens_T)
        ctx.weight = weight_VD
        return torch.embedding(weight_VD, tokens_T)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor | None]:
        weight_VD, tokens_T = ctx.weight, ctx.saved_tensors[0]
        known = gradient_of(weight_VD, grads[0].dtype)
        if known is None:
            return None, torch.ops.aten.embedding_dense_backward(grads[0], tokens_T, len(weight_VD), -1, False)
        known.index_put_((tokens_T,), grads[0], accumulate=True)
        return None, None
