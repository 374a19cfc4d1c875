"""One step of AdamW (arXiv 1711.05101) on a tensor whose running means are bytes in blocks of 256 (`quant.bytes_of`).

A weight in bfloat16 is rounded at random. The squares are never code 0, which is zero: a mean divided by eps alone would fly away.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from garage.kernels.quant import bytes_dense, bytes_of


class Means(NamedTuple):
    """Codes uint8 and the largest number of each block, of the running mean of the gradient and of its square."""

    mean: Tensor
    mean_max: Tensor
    square: Tensor
    square_max: Tensor

    @staticmethod
    def zero(weight: Tensor) -> "Means":
        """Before the first step."""
        zero = torch.zeros(weight.numel(), device=weight.device)
        return Means(*bytes_of(zero), *bytes_of(zero, signed=False))


class Step(NamedTuple):
    """Settings of one step; `number` counts from 1."""

    lr: float
    decay: float
    beta1: float
    beta2: float
    eps: float
    number: float

    @property
    def rate(self) -> float:
        """The learning rate with the correction of the mean's bias."""
        return float(self.lr / (1 - self.beta1**self.number))

    @property
    def unbias(self) -> float:
        """What the mean of squares is divided by."""
        return float(1 - self.beta2**self.number)


def update(weight: Tensor, grad: Tensor, means: Means, step: Step) -> Means:
    """Changes the weight and returns its new means, which may use the memory of the old ones."""
    grad = grad.flatten().float()
    mean = bytes_dense(means.mean, means.mean_max).lerp_(grad, 1 - step.beta1)
    square = bytes_dense(means.square, means.square_max, signed=False).mul_(step.beta2).addcmul_(grad, grad, value=1 - step.beta2)
    root = (square / step.unbias).sqrt_().add_(step.eps)
    change = (mean / root).mul_(step.rate).view_as(weight)
    if weight.dtype == torch.bfloat16:
        weight.copy_(rounded_at_random(weight.float().mul_(1 - step.lr * step.decay).sub_(change)))
    else:
        weight.mul_(1 - step.lr * step.decay).sub_(change)
    codes, largest = bytes_of(square, signed=False)
    return Means(*bytes_of(mean), codes.clamp_(min=1), largest)


def rounded_at_random(wide: Tensor) -> Tensor:
    """float32 -> bfloat16, up or down with the odds that keep the mean, so that changes below half a step are not lost."""
    noise = torch.randint(0, 1 << 16, wide.shape, dtype=torch.int32, device=wide.device)
    return (wide.view(torch.int32) + noise).bitwise_and_(-(1 << 16)).view(torch.float32).bfloat16()
