"""A training or scoring batch: documents end to end, positions restarting at each.

Shape suffixes: T packed tokens, B documents.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from garage.models.attend import PackedAttend


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """`tokens_T` and `positions_T` int64; `bounds` int32 [B + 1], the documents' offsets 0, ..., T."""

    tokens_T: Tensor
    positions_T: Tensor
    bounds: Tensor

    def attend(self) -> PackedAttend:
        """Attention that keeps to each document."""
        return PackedAttend(tuple(self.bounds.tolist()))


def pack(documents: Sequence[Sequence[int] | np.ndarray], device: torch.device | str = "cpu") -> PackedBatch:
    """Lay documents of token ids end to end; each must hold at least one token."""
    lengths = [len(document) for document in documents]
    assert lengths and min(lengths) > 0, lengths
    tokens = torch.from_numpy(np.concatenate([np.asarray(document, dtype=np.int64) for document in documents]))
    positions = torch.cat([torch.arange(length) for length in lengths])
    bounds = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    return PackedBatch(tokens.to(device), positions.to(device), bounds.to(device))
