"""Linears whose frozen matrix is held in few bits and widened where it is used, in the forward and again in the backward.

Nothing else changes: an adapter wraps such a linear like any other (QLoRA, arXiv 2305.14314). Quantising happens while a checkpoint is
read, one matrix at a time, so that no more than one wide matrix is ever in memory. Embedding, head and norms stay as they are.

Limits: the matrix cannot be trained, and merging an adapter into it gives a 16-bit matrix again.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from garage.kernels import dispatch, quant
from garage.models.layers import Linear


class Held(nn.Module, ABC):
    """A matrix [out, in] that is not there in full; `dense` makes it."""

    def __init__(self, shape: torch.Size, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape, self.dtype, self.requires_grad = shape, dtype, False

    @abstractmethod
    def dense(self, dtype: torch.dtype) -> Tensor:
        """The matrix in `dtype`."""

    @property
    def device(self) -> torch.device:
        return next(self.buffers()).device


class HeldNf4(Held):
    """4.127 bits a weight."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight.shape, weight.dtype)
        for name, tensor in dispatch.nf4(weight)._asdict().items():
            self.register_buffer(name, tensor)

    def dense(self, dtype: torch.dtype) -> Tensor:
        packed = quant.Nf4(*(self.get_buffer(name) for name in quant.Nf4._fields))
        return dispatch.nf4_dense(packed, (self.shape[0], self.shape[1]), dtype)


class HeldInt8(Held):
    """8 bits a weight and 32 a row."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight.shape, weight.dtype)
        codes, scale = quant.int8(weight)
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)

    def dense(self, dtype: torch.dtype) -> Tensor:
        return dispatch.int8_dense(self.get_buffer("codes"), self.get_buffer("scale"), dtype)


class QuantLinear(Linear):
    """x W^T with W held in few bits."""

    def __init__(self, held: Held) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = held.shape
        self.weight = held  # type: ignore[assignment]


HOLDERS: Mapping[str, Callable[[Tensor], Held]] = {"nf4": HeldNf4, "int8": HeldInt8}


def quantised(weight: Tensor, bits: str) -> QuantLinear:
    """The linear of this matrix in few bits, "nf4" or "int8"."""
    return QuantLinear(HOLDERS[bits](weight))
