"""From a plan to tensors: one flat row per token, prefill and decode side by side.

The block table lives as long as the engine, one line per running sequence; a step writes only the pages that are new. Positions and
slots are computed for all rows at once, so the Python work of a step grows with its sequences and not with its tokens.

Shape suffixes: T tokens of the step, B sequences of the step, P pages of the longest, R rows whose logits are needed.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from garage.engine.scheduler import Slice


@dataclass(frozen=True)
class StepBatch:
    """Everything a step needs that is not weights or pages. `rows` counts the rows of each sequence, `contexts` its tokens after them."""

    tokens_T: Tensor
    positions_T: Tensor
    slots_T: Tensor
    tables_BP: Tensor
    rows_R: Tensor
    rows: tuple[int, ...]
    contexts: tuple[int, ...]


class Batcher:
    """Owns the block table."""

    def __init__(self, *, max_num_seqs: int, max_pages: int, page_size: int, device: torch.device) -> None:
        self._table = np.zeros((max_num_seqs, max_pages), dtype=np.int64)
        self._page_size, self._device = page_size, device

    def build(self, slices: Seq[Slice]) -> StepBatch:
        """The tensors of one step."""
        for part in slices:
            self._note_pages(part)
        lines_B = np.array([part.sequence.row for part in slices])
        starts_B = np.array([part.start for part in slices])
        stops_B = np.array([part.stop for part in slices])
        counts_B = stops_B - starts_B
        bounds = np.concatenate(([0], counts_B.cumsum()))
        positions_T = np.arange(bounds[-1]) + (starts_B - bounds[:-1]).repeat(counts_B)
        pages_T = self._table[lines_B.repeat(counts_B), positions_T // self._page_size]
        rows_R = [end - 1 for end, part in zip(bounds[1:].tolist(), slices, strict=True) if part.is_last]
        ids = chain.from_iterable(part.sequence.tokens[part.start : part.stop] for part in slices)
        width = -(-int(stops_B.max()) // self._page_size)
        slots_T = pages_T * self._page_size + positions_T % self._page_size
        tokens_T = np.fromiter(ids, dtype=np.int64, count=len(positions_T))
        tables_BP, rows, contexts = self._table[lines_B, :width], tuple(counts_B.tolist()), tuple(stops_B.tolist())
        arrays = (tokens_T, positions_T, slots_T, tables_BP, np.array(rows_R, dtype=np.int64))
        tokens, positions, slots, tables, wanted = map(self._tensor, arrays)
        return StepBatch(tokens, positions, slots, tables, wanted, rows, contexts)

    def _note_pages(self, part: Slice) -> None:
        sequence = part.sequence
        first, last = sequence.num_tabled, len(sequence.pages)
        if first < last:
            self._table[sequence.row, first:last] = sequence.pages[first:last]
            sequence.num_tabled = last

    def _tensor(self, array: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)
