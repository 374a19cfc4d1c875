"""Two homes for keys and values. Each is data plus one call; none is global, and the model cannot tell them apart.

- `PackedAttend`: training and scoring; documents end to end, a token sees earlier tokens of its own document.
- `PagedAttend`: serving; keys and values in shared pages, one step may mix prefill and decode.

Shape suffixes: T packed tokens or tokens of the step, B requests, P pages of one request, M key/value heads, H head width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor

from garage.kernels import dispatch, paged, whole

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class PackedAttend:
    """Documents end to end; `bounds` are their offsets 0, ..., T."""

    bounds: tuple[int, ...]
    _on_device: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __call__(self, q_TNH: Tensor, k_TMH: Tensor, v_TMH: Tensor, *, layer: int, scale: float, window: int | None) -> Tensor:
        if q_TNH.device not in self._on_device:
            self._on_device[q_TNH.device] = torch.tensor(self.bounds, dtype=torch.int32, device=q_TNH.device)
        return dispatch.packed_attention(q_TNH, k_TMH, v_TMH, self.bounds, self._on_device[q_TNH.device], scale=scale, window=window)


@dataclass(frozen=True, eq=False)
class PageTable:
    """Where the requests of a step have their keys and values in some layers. Layers may share one; what is derived is kept here.

    Attributes:
        slots_T: where each row of the step is written: page * page size + offset; int64.
        tables_BP: the pages of each request in order, padded at the end with anything; int64. In layers with a window, pages that lie
            wholly behind it are anything too.
    """

    slots_T: Tensor
    tables_BP: Tensor
    _derived: dict[object, Any] = field(default_factory=dict, init=False, repr=False)

    def derived(self, key: object, make: Callable[[], T]) -> T:
        """What `make` returned the first time it was asked for under this key."""
        if key not in self._derived:
            self._derived[key] = make()
        return self._derived[key]  # type: ignore[no-any-return]


@dataclass(frozen=True, eq=False)
class PagedAttend:
    """One step over requests whose keys and values lie in pages. The rows of a request are adjacent, requests in order.

    Attributes:
        keys, values: per layer a pool [pages, page size, M, H], written by the call.
        tables: per layer which pages.
        rows: how many rows of the step each request has; 1 is decode.
        contexts: the length of each request after this step's rows; `contexts_B` are the same on the device, if they are there already.

    The work that depends on the step alone (which pages, which mask) is done in the first layer and kept for the others.
    """

    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    tables: Sequence[PageTable]
    rows: tuple[int, ...]
    contexts: tuple[int, ...]
    contexts_B: Tensor | None = None

    def __call__(self, q_TNH: Tensor, k_TMH: Tensor, v_TMH: Tensor, *, layer: int, scale: float, window: int | None) -> Tensor:
        keys, values, table = self.keys[layer], self.values[layer], self.tables[layer]
        if (kernels := dispatch.paged_kernels(q_TNH, keys)) is not None:
            kernels.write(keys, values, table.slots_T, k_TMH, v_TMH)
            at = (table.tables_BP, self._contexts_B, self.rows)
            return kernels.attend(q_TNH, (keys, values), *at, scale=scale, window=window)  # type: ignore[no-any-return]
        fresh_P = table.derived("fresh", lambda: _fresh(table.slots_T, keys.shape[1]))
        paged.write(keys, fresh_P, table.slots_T, k_TMH)
        paged.write(values, fresh_P, table.slots_T, v_TMH)
        out_TNH = q_TNH.new_empty(q_TNH.shape)
        if self._decoding:
            gather = table.derived(window, lambda: self._gather(table, keys.shape[1], window))
            out_TNH[gather.rows_B] = paged.decode(q_TNH[gather.rows_B], keys, values, gather, scale=scale)
        for i, (first, last) in enumerate(pairwise(self._starts)):
            if last - first > 1:
                pages_P = table.tables_BP[i]
                out_TNH[first:last] = paged.prefill(q_TNH[first:last], keys, values, pages_P, self.contexts[i], scale=scale, window=window)
        return out_TNH

    def step(self, layer: int) -> whole.Step:
        """Where the rows of this step lie in `layer`, for a layer that is one call."""
        table, page = self.tables[layer], self.keys[layer].shape[1]
        return table.derived("step", lambda: whole.Step(table.slots_T, table.tables_BP, self._contexts_B, self.rows, page))

    @cached_property
    def _contexts_B(self) -> Tensor:
        return torch.tensor(self.contexts, device=self.tables[0].slots_T.device) if self.contexts_B is None else self.contexts_B

    @cached_property
    def _starts(self) -> list[int]:
        return list(accumulate(self.rows, initial=0))

    @cached_property
    def _decoding(self) -> list[int]:
        return [i for i, rows in enumerate(self.rows) if rows == 1]

    def _gather(self, table: PageTable, page_size: int, window: int | None) -> paged.Gather:
        place, members = table.slots_T.device, self._decoding
        rows_B, contexts_B = (torch.tensor([source[i] for i in members], device=place) for source in (self._starts, self.contexts))
        return paged.plan_gather(rows_B, table.tables_BP[members], contexts_B, page_size=page_size, window=window)


def _fresh(slots_T: Tensor, page_size: int) -> Tensor:
    """Pages whose first slot is written in this step."""
    return slots_T[slots_T % page_size == 0] // page_size
