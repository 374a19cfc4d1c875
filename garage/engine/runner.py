"""The model and its key/value pages: one plan in, the logits of the rows that need them out.

The pools are allocated once, before the first request, so that a request never fails for memory halfway. Their number of pages is
given or follows from `kv_cache_bytes`; the longest request must fit in them alone.

Shape suffixes: T tokens of the step, R rows whose next token is wanted, V vocabulary.
"""

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from garage.core.errors import UserError
from garage.engine import graphs
from garage.engine.batch import Batcher
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
        layer_shape, held = (settings.page_size, config.num_key_value_heads, config.head_dim), numbers(settings, weight.dtype)
        self.num_pages = settings.num_pages or max(settings.kv_cache_bytes // page_bytes(config, settings, weight.dtype), 1)
        self.max_model_len = longest(settings, self.num_pages, config.max_position_embeddings)
        can_capture = graphs.can_capture(torch.empty(0, dtype=weight.dtype, device=weight.device)) and not settings.enforce_eager
        shape = (self.num_pages + can_capture, *layer_shape)
        self._keys, self._values = (
            tuple(torch.empty(shape, dtype=held, device=weight.device) for _ in range(config.num_hidden_layers)) for _ in range(2)
        )
        max_pages = -(-self.max_model_len // settings.page_size)
        self._batcher = Batcher(max_num_seqs=settings.max_num_seqs, max_pages=max_pages, page_size=settings.page_size, device=weight.device)

        pools = (self._keys, self._values)
        self._decoding = graphs.Decoding(model, pools, most=settings.max_num_seqs, width=max_pages) if can_capture else None

    def run(self, slices: Seq[Slice]) -> Tensor:
        """Compute the slices, keys and values into their pages; returns the logits [R, V] after those that end their sequence."""
        batch = self._batcher.build(slices)
        is_plain = all(part.is_last and part.stop == part.start + 1 and part.sequence.reading is None for part in slices)
        if self._decoding is not None and is_plain:
            return self._decoding.run(batch)
        attend = PagedAttend(self._keys, self._values, batch.slots_T, batch.tables_BP, batch.rows, batch.contexts)
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


def numbers(settings: EngineSpec, dtype: torch.dtype) -> torch.dtype:
    """What keys and values are held in under weights of `dtype`."""
    return torch.float8_e4m3fn if settings.kv_cache_dtype == "fp8" else dtype


def page_bytes(config: Config, settings: EngineSpec, dtype: torch.dtype) -> int:
    """What one page takes, over all layers."""
    width = config.num_key_value_heads * config.head_dim
    return 2 * config.num_hidden_layers * settings.page_size * width * numbers(settings, dtype).itemsize


def longest(settings: EngineSpec, num_pages: int, positions: int) -> int:
    """The longest prompt and answer together.

    Raises:
        UserError: what is asked for has no positions, or no room in the pages.
    """
    room = num_pages * settings.page_size
    wanted = settings.max_model_len
    if wanted is None:
        return min(positions, room)
    if wanted > positions:
        raise UserError(f"max_model_len {wanted} exceeds the {positions} positions of this model", remedy=f"give at most {positions}")
    if wanted > room:
        remedy = f"give at most {room}, or more kv_cache_bytes or num_pages"
        raise UserError(f"max_model_len {wanted} does not fit in {num_pages} pages of {settings.page_size} tokens", remedy=remedy)
    return wanted
