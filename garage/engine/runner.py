"""The model and its key/value pages: one plan in, the logits of the rows that need them out.

The pools are allocated once, before the first request, so that a request never fails for memory halfway. Their number of pages is
given or follows from `kv_cache_bytes`; the longest request must fit in them alone.

Shape suffixes: T tokens of the step, R rows whose next token is wanted, V vocabulary.
"""

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from garage.core.errors import UserError
from garage.engine.batch import Batcher
from garage.engine.scheduler import Slice
from garage.models.attend import PagedAttend
from garage.models.layers import Model
from garage.specs.serve import EngineSpec


class Runner:
    """Runs one model on one device."""

    def __init__(self, model: Model, settings: EngineSpec, vocab_size: int) -> None:
        config, weight = model.config, model.lm_head.weight
        self._model, self._vocab_size = model, vocab_size
        layer_shape = (settings.page_size, config.num_key_value_heads, config.head_dim)
        page_bytes = 2 * config.num_hidden_layers * layer_shape[0] * layer_shape[1] * layer_shape[2] * weight.dtype.itemsize
        self.num_pages = settings.num_pages or max(settings.kv_cache_bytes // page_bytes, 1)
        self.max_model_len = self._longest(settings, config.max_position_embeddings)
        shape = (self.num_pages, *layer_shape)
        self._keys, self._values = (
            tuple(torch.empty(shape, dtype=weight.dtype, device=weight.device) for _ in range(config.num_hidden_layers)) for _ in range(2)
        )
        max_pages = -(-self.max_model_len // settings.page_size)
        self._batcher = Batcher(max_num_seqs=settings.max_num_seqs, max_pages=max_pages, page_size=settings.page_size, device=weight.device)

    def run(self, slices: Seq[Slice]) -> Tensor:
        """Compute the slices, keys and values into their pages; returns the logits [R, V] after those that end their sequence."""
        batch = self._batcher.build(slices)
        attend = PagedAttend(self._keys, self._values, batch.slots_T, batch.tables_BP, batch.rows, batch.contexts)
        hidden_TD: Tensor = self._model(batch.tokens_T, batch.positions_T, attend)
        if any(part.sequence.reading is not None for part in slices):
            self._read(slices, torch.split(hidden_TD, list(batch.rows)))
        return self._model.logits(hidden_TD[batch.rows_R])

    def _read(self, slices: Seq[Slice], hidden_TD: Seq[Tensor]) -> None:
        for part, rows_TD in zip(slices, hidden_TD, strict=True):
            if part.sequence.reading is not None:
                part.sequence.reading.take(self._model, rows_TD, part.start, part.sequence.tokens, self._vocab_size)

    def _longest(self, settings: EngineSpec, positions: int) -> int:
        room = self.num_pages * settings.page_size
        wanted = settings.max_model_len
        if wanted is None:
            return min(positions, room)
        if wanted > positions:
            raise UserError(f"max_model_len {wanted} exceeds the {positions} positions of this model", remedy=f"give at most {positions}")
        if wanted > room:
            remedy = f"give at most {room}, or more kv_cache_bytes or num_pages"
            raise UserError(f"max_model_len {wanted} does not fit in {self.num_pages} pages of {settings.page_size} tokens", remedy=remedy)
        return wanted
