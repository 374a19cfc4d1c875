"""From a plan to tensors: one flat row per token, prefill and decode side by side.

The block table of a group of layers lives on the device as long as the engine, one line per running sequence; a step sends only the
pages that are new, and a few numbers per row. The token last sampled for each line is there too: one that the host does not know yet is
read from it.

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
from garage.engine.request import PENDING
from garage.engine.rules import put
from garage.engine.scheduler import Slice
from garage.models.attend import PageTable


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
    """Owns the block tables. Line `max_num_seqs` is nobody's: all its pages are `spare`."""

    def __init__(self, layout: Layout, *, max_num_seqs: int, max_model_len: int, spare: int, device: torch.device) -> None:
        self._layout = layout
        widths = [-(-max_model_len // group.span) for group in layout.groups]
        self._pages = [torch.full((max_num_seqs + 1, width), spare, device=device) for width in widths]
        self.last_ids = torch.zeros(max_num_seqs + 1, dtype=torch.int64, device=device)
        self._distinct = tuple(dict.fromkeys(layout.tables))
        self._table_of = tuple(self._distinct.index(table) for table in layout.tables)

    def build(self, slices: Seq[Slice]) -> StepBatch:
        """The tensors of one step."""
        self.note_pages(slices)
        starts_B = np.array([part.start for part in slices])
        stops_B = np.array([part.stop for part in slices])
        counts_B = stops_B - starts_B
        bounds = np.concatenate(([0], counts_B.cumsum()))
        owners_T = np.arange(len(slices)).repeat(counts_B)
        positions_T = np.arange(bounds[-1]) + (starts_B - bounds[:-1]).repeat(counts_B)
        ends = [(end, part.sequence.num_drafts) for end, part in zip(bounds[1:].tolist(), slices, strict=True) if part.is_last]
        rows_R = [row for end, drafts in ends for row in range(end - 1 - drafts, end)]
        ids = chain.from_iterable(part.sequence.tokens[part.start : part.stop] for part in slices)
        tokens_T = np.fromiter(ids, dtype=np.int64, count=len(positions_T))
        made = (put(each, self.last_ids) for each in (np.array([part.sequence.row for part in slices]), owners_T, positions_T, tokens_T))
        lines_B, owners, positions, tokens = made
        if any(part.sequence.is_pending for part in slices):
            tokens = self.known(tokens, lines_B[owners])
        tables = self.tables(lines_B, owners, positions, width=-(-int(stops_B.max()) // self._layout.page_size))
        wanted = put(np.array(rows_R, dtype=np.int64), self.last_ids)
        return StepBatch(tokens, positions, tables, wanted, tuple(counts_B.tolist()), tuple(stops_B.tolist()))

    def note_pages(self, slices: Seq[Slice]) -> None:
        """Write what is new into the block tables."""
        for number, pages in enumerate(self._pages):
            new: list[tuple[int, int, int]] = []
            for part in slices:
                table, line = part.sequence.tables[number], part.sequence.row
                new += ((line, place, table.pages[place]) for place in range(table.num_tabled, len(table.pages)))
                table.num_tabled = len(table.pages)
            if new:
                lines, places, values = put(np.array(new).T.copy(), pages)
                pages[lines, places] = values

    def tables(self, lines_B: Tensor, owners_T: Tensor, positions_T: Tensor, *, width: int | None = None) -> tuple[PageTable, ...]:
        """For every layer where the sequences of these lines have their pages, the first `width` units or all. Waits for nothing."""
        made = [self._table(table, lines_B, owners_T, positions_T, width) for table in self._distinct]
        return tuple(made[number] for number in self._table_of)

    def known(self, tokens: Tensor, lines: Tensor) -> Tensor:
        """The tokens, with those that are pending as they were sampled."""
        return torch.where(tokens == PENDING, self.last_ids[lines], tokens)

    def _table(self, table: Table, lines_B: Tensor, owners_T: Tensor, positions_T: Tensor, width: int | None) -> PageTable:
        """Pages to units: a page of a group that spans `wide` units is `wide` entries of the table."""
        size, units = self._layout.page_size, self._layout.units
        wide = self._layout.groups[table.group].span // size
        units_BP = self._pages[table.group][lines_B, : None if width is None else -(-width // wide)]
        if units > 1:
            units_BP = units_BP * units + table.unit
        if wide > 1:
            units_BP = (units_BP[:, :, None] + torch.arange(wide, device=units_BP.device)).flatten(1)[:, :width]
        slots_T = units_BP[owners_T, positions_T // size] * size + positions_T % size
        return PageTable(slots_T, units_BP)
