"""The model and its key/value pages: one plan in, the next tokens of the rows that need them out.

The pools are allocated once, before the first request, so that a request never fails for memory halfway. Their number of pages is
given or follows from `kv_cache_bytes`; the longest request must fit in them alone.

Shape suffixes: T tokens of the step, R rows whose next token is wanted, V vocabulary.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from garage.core.errors import UserError
from garage.engine import graphs
from garage.engine.batch import Batcher
from garage.engine.layout import Layout
from garage.engine.pages import longest
from garage.engine.request import Row
from garage.engine.rules import put
from garage.engine.sampler import Sampled, sample
from garage.engine.scheduler import Slice
from garage.models.attend import PagedAttend
from garage.models.config import Config
from garage.models.layers import Model
from garage.models.many import Many
from garage.specs.serve import EngineSpec


class Runner:
    """Runs one model on one device."""

    def __init__(self, model: Model, settings: EngineSpec, vocab_size: int, many: Many | None = None) -> None:
        config, weight = model.config, model.lm_head.weight
        self._model, self._vocab_size, self._many = model, vocab_size, many
        self.room = Room.of(config, settings, weight.dtype)
        self.layout, self.num_pages, self.max_model_len, held = self.room.layout, self.room.num_pages, self.room.longest, self.room.dtype
        can_capture = graphs.can_capture(torch.empty(0, dtype=weight.dtype, device=weight.device)) and not settings.enforce_eager
        self.is_ahead = weight.device.type == "cuda" if settings.async_scheduling is None else settings.async_scheduling
        units = (self.num_pages + can_capture) * self.layout.units  # and a scratch page
        shape = (units, settings.page_size, config.num_key_value_heads, config.head_dim)
        lanes = [[torch.empty(shape, dtype=held, device=weight.device) for _ in range(self.layout.num_lanes)] for _ in range(2)]
        self._keys, self._values = (tuple(half[lane] for lane in self.layout.lanes) for half in lanes)
        sizes = {"max_num_seqs": settings.max_num_seqs, "max_model_len": self.max_model_len, "spare": self.num_pages}
        self._batcher = Batcher(self.layout, device=weight.device, **sizes)
        self._decoding = graphs.Decoding(model, (self._keys, self._values), self._batcher, vocab_size) if can_capture else None

    def step(self, slices: Seq[Slice], rows: Seq[Row]) -> Sampled | None:
        """Compute the slices and sample `rows`, which follow those slices that end their sequence; None if there are none."""
        picked = None
        if self._decoding is not None and _is_plain(slices):
            logits_RV, picked = self._decoding.run(slices, rows)
        else:
            logits_RV = self.run(slices)
        if not rows:
            return None
        sampled = sample(logits_RV, rows, self._vocab_size, picked)
        self._batcher.last_ids[put([s.row for s, _ in rows], sampled.ids_R)] = sampled.ids_R
        return sampled

    def run(self, slices: Seq[Slice]) -> Tensor:
        """Compute the slices, keys and values into their pages; returns the logits [R, V] after those that end their sequence."""
        batch = self._batcher.build(slices)
        attend = PagedAttend(self._keys, self._values, batch.tables, batch.rows, batch.contexts)
        if self._many is not None:
            adapters = (part.sequence.adapter for part in slices)
            self._many.tell([None if adapter is None else adapter.slot for adapter in adapters], batch.rows)
        hidden_TD: Tensor = self._model(batch.tokens_T, batch.positions_T, attend)
        if any(part.sequence.reading is not None for part in slices):
            self._read(slices, torch.split(hidden_TD, list(batch.rows)))
        return self._model.logits(hidden_TD[batch.rows_R])

    def _read(self, slices: Seq[Slice], hidden_TD: Seq[Tensor]) -> None:
        for part, rows_TD in zip(slices, hidden_TD, strict=True):
            if part.sequence.reading is not None:
                part.sequence.reading.take(self._model, rows_TD, part.start, part.sequence.tokens, self._vocab_size)


def _is_plain(slices: Seq[Slice]) -> bool:
    """Whether each slice is the last token of a sequence of the base model of which only the next is wanted."""
    sequences = [part.sequence for part in slices if part.is_last and part.stop == part.start + 1]
    return len(sequences) == len(slices) and all(s.reading is None and s.adapter is None for s in sequences)


@dataclass(frozen=True)
class Room:
    """How many pages there are, in what numbers, and how long the longest prompt and answer together may be."""

    layout: Layout
    num_pages: int
    dtype: torch.dtype
    longest: int
    page_bytes: int

    @staticmethod
    def of(config: Config, settings: EngineSpec, dtype: torch.dtype) -> "Room":
        """For weights of `dtype`.

        Raises:
            UserError: the length that is asked for has no positions, or no room in the pages.
        """
        positions, wanted = config.max_position_embeddings, settings.max_model_len
        layout = Layout.of(config, settings.page_size, min(wanted or positions, positions))
        held = held_in(settings, dtype)
        each = layout.page_bytes(config, held.itemsize)
        fitting = max(settings.kv_cache_bytes // each, len(layout.groups))
        num_pages = layout.pages_for(settings.num_pages) if settings.num_pages else fitting
        room = longest(layout.groups, num_pages, settings.max_num_batched_tokens, positions)
        if wanted is not None and wanted > positions:
            raise UserError(f"max_model_len {wanted} exceeds the {positions} positions of this model", remedy=f"give at most {positions}")
        if wanted is not None and wanted > room:
            remedy = f"give at most {room}, or more kv_cache_bytes or num_pages"
            raise UserError(f"max_model_len {wanted} does not fit in the {num_pages} pages of the cache", remedy=remedy)
        return Room(layout, num_pages, held, wanted or min(positions, room), each)

    @property
    def tokens(self) -> int:
        """Tokens that fit if every layer keeps all of them; behind a window more do."""
        return int(self.num_pages / sum(1 / group.span for group in self.layout.groups))


def held_in(settings: EngineSpec, dtype: torch.dtype) -> torch.dtype:
    """What keys and values are held in beside weights of `dtype`."""
    return torch.float8_e4m3fn if settings.kv_cache_dtype == "fp8" else dtype
