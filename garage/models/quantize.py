"""Linears whose frozen matrix is held in few bits and widened where it is used, in the forward and again in the backward.

Nothing else changes: an adapter wraps such a linear like any other (QLoRA, arXiv 2305.14314). Quantising happens while a checkpoint is
read, one matrix at a time, so that no more than one wide matrix is ever in memory. Norms stay as they are, and so do embedding and head
unless `hold_embedding` is asked for: those are widened some rows at a time.

Limits: the matrix cannot be trained, and merging an adapter into it gives a 16-bit matrix again.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from garage.kernels import dispatch, quant, tiles
from garage.models.layers import Embedding, Linear, Model


class Held(nn.Module, ABC):
    """A matrix [out, in] that is not there in full; `dense` makes it."""

    def __init__(self, shape: torch.Size, dtype: torch.dtype) -> None:
        super().__init__()
        self.shape, self.dtype, self.requires_grad = shape, dtype, False

    @abstractmethod
    def dense(self, dtype: torch.dtype, rows: slice = slice(None)) -> Tensor:
        """The matrix, or some of its rows, in `dtype`."""

    def product(self, x_TI: Tensor) -> Tensor | None:
        """x W^T straight from the bits, for a few rows on a GPU; None if they have to be widened."""
        return None

    @property
    def device(self) -> torch.device:
        return next(self.buffers()).device


class HeldNf4(Held):
    """4.127 bits a weight."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight.shape, weight.dtype)
        self._hold(dispatch.nf4(weight))

    @classmethod
    def of(cls, packed: quant.Nf4, shape: torch.Size, dtype: torch.dtype) -> "HeldNf4":
        """A matrix whose codes are there already."""
        held = cls.__new__(cls)
        Held.__init__(held, shape, dtype)
        held._hold(packed)
        return held

    def _hold(self, packed: quant.Nf4) -> None:
        for name, tensor in packed._asdict().items():
            self.register_buffer(name, tensor)

    def dense(self, dtype: torch.dtype, rows: slice = slice(None)) -> Tensor:
        return dispatch.nf4_dense(self._packed(), (self.shape[0], self.shape[1]), dtype)[rows]

    def product(self, x_TI: Tensor) -> Tensor | None:
        return dispatch.nf4_product(x_TI, self._packed(), self.shape[0])

    def _packed(self) -> quant.Nf4:
        return quant.Nf4(*(self.get_buffer(name) for name in quant.Nf4._fields))


class HeldInt8(Held):
    """8 bits a weight and 32 a row."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight.shape, weight.dtype)
        codes, scale = quant.int8(weight)
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)

    def dense(self, dtype: torch.dtype, rows: slice | Tensor = slice(None)) -> Tensor:
        return dispatch.int8_dense(self.get_buffer("codes")[rows], self.get_buffer("scale")[rows], dtype)

    def product(self, x_TI: Tensor) -> Tensor | None:
        return dispatch.int8_product(x_TI, self.get_buffer("codes"), self.get_buffer("scale"))


class HeldTiles(Held):
    """A matrix as the CPU's compiled products want it (`kernels.tiles`): bf16 in another order, or few bits."""

    def __init__(self, weight: Tensor, bits: tiles.Bits) -> None:
        super().__init__(weight.shape, weight.dtype)
        self._hold(tiles.tiled(weight, bits))

    @classmethod
    def joined(cls, parts: Sequence["HeldTiles"]) -> "HeldTiles":
        """Matrices of one width on top of each other."""
        held = cls.__new__(cls)
        Held.__init__(held, torch.Size((sum(part.shape[0] for part in parts), parts[0].shape[1])), parts[0].dtype)
        held._hold(tiles.joined([part.tiles for part in parts]))
        return held

    def _hold(self, made: tiles.Tiles) -> None:
        self.tiles, self._size = made, (self.shape[0], self.shape[1])

    @property
    def device(self) -> torch.device:
        return self.tiles.codes.device

    def dense(self, dtype: torch.dtype, rows: slice | Tensor = slice(None)) -> Tensor:
        return tiles.dense(self.tiles, self._size, dtype, rows)

    def product(self, x_TI: Tensor) -> Tensor:
        """x W^T in the dtype of x."""
        return tiles.product(x_TI, self.tiles, self._size)


class HeldFp8(Held):
    """8 bits a weight as a floating-point number, and 32 a row."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight.shape, weight.dtype)
        codes, scale = quant.fp8(weight)
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)

    def dense(self, dtype: torch.dtype, rows: slice | Tensor = slice(None)) -> Tensor:
        return (self.get_buffer("codes")[rows].float() * self.get_buffer("scale")[rows, None]).to(dtype)

    def product(self, x_TI: Tensor) -> Tensor:
        return quant.fp8_product(x_TI, self.get_buffer("codes"), self.get_buffer("scale"))


class QuantLinear(Linear):
    """x W^T with W held in few bits."""

    def __init__(self, held: Held) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = held.shape
        self.weight = held  # type: ignore[assignment]


class DirectLinear(QuantLinear):
    """x W^T from the bits whatever the rows, for answering."""

    weight: HeldTiles | HeldFp8  # type: ignore[assignment]

    def forward(self, x_TI: Tensor) -> Tensor:
        return self.weight.product(x_TI)


class TiledLinear(DirectLinear):
    """With W in tiles."""

    weight: HeldTiles


class QuantEmbedding(Embedding):
    """Rows of a matrix held in 8 bits or in tiles, in the dtype it had."""

    weight: HeldInt8 | HeldTiles  # type: ignore[assignment]

    def __init__(self, held: HeldInt8 | HeldTiles) -> None:
        nn.Module.__init__(self)
        self.weight = held

    def forward(self, tokens_T: Tensor) -> Tensor:
        return self.weight.dense(self.weight.dtype, tokens_T)


def hold_embedding(model: Model) -> Model:
    """Hold the embedding, and the head if it is another matrix, in 8 bits; they cannot be trained then."""
    head = None if model.config.tie_word_embeddings else QuantLinear(HeldInt8(model.lm_head.weight))
    model.model.embed_tokens = QuantEmbedding(HeldInt8(model.model.embed_tokens.weight))
    model.lm_head = head or QuantLinear(model.model.embed_tokens.weight)
    return model


HOLDERS: Mapping[str, type[HeldNf4] | type[HeldInt8]] = {"nf4": HeldNf4, "int8": HeldInt8}


def widen(model: Model) -> Model:
    """Make every matrix that is held in few bits an ordinary one of the same numbers."""
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantLinear):
            model.set_submodule(name, Linear.holding(module.dense(module.weight.dtype)))
    return model


def quantised(weight: Tensor, bits: str) -> QuantLinear:
    """The linear of this matrix in few bits, "nf4" or "int8"."""
    return QuantLinear(HOLDERS[bits](weight))
