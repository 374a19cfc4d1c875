"""From a plan to tensors: one flat row per token, prefill and decode side by side.

The block table of a group of layers lives as long as the engine, one line per running sequence; a step writes only the pages that are
new. Positions and slots are computed for all rows at once, so the Python work of a step grows with its sequences and not with its tokens.

Pages become units here (`engine.layout`): the model's layers see tables of units of `page_size` tokens, whatever their group.

Shape suffixes: T tokens of the step, B sequences of the step, P units of the longest, R rows whose logits are needed.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from garage.engine.layout import Layout, Table
from garage.engine.scheduler import Slice
from garage.models.attend import PageTable

Ints = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


@dataclass(frozen=True)
class StepBatch:
    """Everything a step needs that is not weights or pages: a table for every layer; `rows` of each sequence, `contexts` after them."""

    tokens_T: Tensor
    positions_T: Tensor
    tables: tuple[PageTable, ...]
    rows_R: Tensor
    rows: tuple[int, ...]
    contexts: tuple[int, ...]


class Batcher:
    """Owns the block tables."""

    def __init__(self, layout: Layout, *, max_num_seqs: int, max_model_len: int, device: torch.device) -> None:
        widths = [-(-max_model_len // group.span) for group in layout.groups]
        self._pages = [np.zeros((max_num_seqs, width), dtype=np.int64) for width in widths]
        self._layout, self._device = layout, device
        self._distinct = tuple(dict.fromkeys(layout.tables))
        self.table_of = tuple(self._distinct.index(table) for table in layout.tables)

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
        ends = [(end, part.sequence.num_drafts) for end, part in zip(bounds[1:].tolist(), slices, strict=True) if part.is_last]
        rows_R = [row for end, drafts in ends for row in range(end - 1 - drafts, end)]
        ids = chain.from_iterable(part.sequence.tokens[part.start : part.stop] for part in slices)
        tokens_T = np.fromiter(ids, dtype=np.int64, count=len(positions_T))
        rows, contexts = tuple(counts_B.tolist()), tuple(stops_B.tolist())
        tokens, positions, wanted = map(self._tensor, (tokens_T, positions_T, np.array(rows_R, dtype=np.int64)))
        width = -(-int(stops_B.max()) // self._layout.page_size)
        made = [self._table(table, lines_B, width, np.arange(len(slices)).repeat(counts_B), positions_T) for table in self._distinct]
        return StepBatch(tokens, positions, tuple(made[i] for i in self.table_of), wanted, rows, contexts)

    def _note_pages(self, part: Slice) -> None:
        for lines, table in zip(self._pages, part.sequence.tables, strict=True):
            first, last = table.num_tabled, len(table.pages)
            if first < last:
                lines[part.sequence.row, first:last] = table.pages[first:last]
                table.num_tabled = last

    def _table(self, table: Table, lines_B: Ints, width: int, owners_T: Ints, positions_T: Ints) -> PageTable:
        """Pages to units: a page of a group that spans `wide` units is `wide` entries of the table."""
        size, units = self._layout.page_size, self._layout.units
        wide = self._layout.groups[table.group].span // size
        units_BP = self._pages[table.group][lines_B, : -(-width // wide)]
        if units > 1:
            units_BP = units_BP * units + table.unit
        if wide > 1:
            units_BP = (units_BP[:, :, None] + np.arange(wide)).reshape(len(lines_B), -1)[:, :width]
        slots_T = units_BP[owners_T, positions_T // size] * size + positions_T % size
        return PageTable(self._tensor(slots_T), self._tensor(units_BP))

    def _tensor(self, array: Ints) -> Tensor:
        return torch.from_numpy(array).to(self._device, non_blocking=True)
