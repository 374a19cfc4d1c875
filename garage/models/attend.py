"""Two homes for keys and values. Each is data plus one call; none is global, and the model cannot tell them apart.

- `PackedAttend`: training and scoring; documents end to end, a token sees earlier tokens of its own document.
- `PagedAttend`: serving; keys and values in shared pages, one step may mix prefill and decode.

Shape suffixes: T packed tokens or tokens of the step, B requests, P pages of one request, M key/value heads, H head width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from garage.kernels import dispatch, paged


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
class PagedAttend:
    """One step over requests whose keys and values lie in pages. The rows of a request are adjacent, requests in order.

    Attributes:
        keys, values: per layer a pool [pages, page size, M, H], written by the call.
        slots_T: where each row of the step is written: page * page size + offset; int64.
        tables_BP: the pages of each request in order, padded at the end with anything; int64.
        rows: how many rows of the step each request has; 1 is decode.
        contexts: the length of each request after this step's rows; `contexts_B` are the same on the device, if they are there already.

    The work that depends on the step alone (which pages, which mask) is done in the first layer and kept for the others.
    """

    keys: Sequence[Tensor]
    values: Sequence[Tensor]
    slots_T: Tensor
    tables_BP: Tensor
    rows: tuple[int, ...]
    contexts: tuple[int, ...]
    contexts_B: Tensor | None = None
    _gathers: dict[int | None, paged.Gather] = field(default_factory=dict, init=False, repr=False)

    def __call__(self, q_TNH: Tensor, k_TMH: Tensor, v_TMH: Tensor, *, layer: int, scale: float, window: int | None) -> Tensor:
        keys, values = self.keys[layer], self.values[layer]
        if (kernels := dispatch.paged_kernels(q_TNH, keys)) is not None:
            kernels.write(keys, values, self.slots_T, k_TMH, v_TMH)
            at = (self.tables_BP, self._contexts_B, self.rows)
            return kernels.attend(q_TNH, (keys, values), *at, scale=scale, window=window)  # type: ignore[no-any-return]
        paged.write(keys, self._fresh_P, self.slots_T, k_TMH)
        paged.write(values, self._fresh_P, self.slots_T, v_TMH)
        out_TNH = q_TNH.new_empty(q_TNH.shape)
        if self._decoding:
            gather = self._gather(window)
            out_TNH[gather.rows_B] = paged.decode(q_TNH[gather.rows_B], keys, values, gather, scale=scale)
        for i, (first, last) in enumerate(pairwise(self._starts)):
            if last - first > 1:
                table_P = self.tables_BP[i]
                out_TNH[first:last] = paged.prefill(q_TNH[first:last], keys, values, table_P, self.contexts[i], scale=scale, window=window)
        return out_TNH

    @cached_property
    def _contexts_B(self) -> Tensor:
        return torch.tensor(self.contexts, device=self.slots_T.device) if self.contexts_B is None else self.contexts_B

    @cached_property
    def _starts(self) -> list[int]:
        return list(accumulate(self.rows, initial=0))

    @cached_property
    def _decoding(self) -> list[int]:
        return [i for i, rows in enumerate(self.rows) if rows == 1]

    @cached_property
    def _fresh_P(self) -> Tensor:
        page_size = self.keys[0].shape[1]
        return self.slots_T[self.slots_T % page_size == 0] // page_size

    def _gather(self, window: int | None) -> paged.Gather:
        if window not in self._gathers:
            place, members = self.slots_T.device, self._decoding
            rows_B, contexts_B = (torch.tensor([source[i] for i in members], device=place) for source in (self._starts, self.contexts))
            page_size = self.keys[0].shape[1]
            self._gathers[window] = paged.plan_gather(rows_B, self.tables_BP[members], contexts_B, page_size=page_size, window=window)
        return self._gathers[window]
