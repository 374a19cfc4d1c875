"""Many adapters over one base, in one batch: each row of a step has its own, or none, and no weight of the base changes.

The adapters of a linear lie side by side in stacks, one slot each, ranks padded with zeros. The scale is folded into B, and DoRA's
gain m / n too, so that every kind is the same sum:

    y = (1 + sum w (m / n - 1)) W x + sum w B A x,    w the weights of the row: 1 for its adapter, 0 for the others

With one weight of 1 that is what the adapter alone would give, but for rounding; with weights 0.7 and 0.3 it is W x plus as much of each
change. A row without an adapter gets W x times 1 plus zeros: the base's answer to the bit.

The model is told, it never asks: every `Adapted` reads the one `Rows` it was made with, and whoever runs the model sets it before the
forward, by `tell` for the rows of a batch or by `use` for all that follow. Rows that share an adapter are one product. Mixed ones are
one product with the columns of all slots, each row's foreign ones set to zero: three calls, however many the adapters. Where that wastes
more than it saves (long prompts), each run of rows is a product of its own.

Limits: for answering, not for training or merging.
Shape suffixes: T packed tokens, I inputs, O outputs, R rank, S slots, C columns: slots times rank.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, groupby
from pathlib import Path

import torch
from torch import Tensor, nn

from garage.core.artifact import stated
from garage.core.errors import UserError
from garage.models.adapters import DoRA, LoRA, read_loras
from garage.models.layers import Linear, Model
from garage.models.quantize import HOLDERS

_CALL = {("cpu", torch.bfloat16): 1 << 12, ("cpu", torch.float32): 1 << 9}
_CALL_ELSEWHERE = 1 << 18
"""What one product more costs, in columns of a row computed for nothing: measured on a CPU core at widths 576 to 1,536; else estimated."""


@dataclass(frozen=True, eq=False)
class Piece:
    """Rows of a step that are one product: `members` are their slots, all within `slots`; no weights = 1 for the only one."""

    rows: slice
    slots: slice
    members: frozenset[int]
    weights_TS: Tensor | None = None
    _columns: dict[int, Tensor] = field(default_factory=dict, repr=False)

    def columns(self, rank: int) -> Tensor:
        """The weights, once for every column of a slot."""
        if rank not in self._columns:
            assert self.weights_TS is not None
            self._columns[rank] = self.weights_TS.repeat_interleave(rank, 1)
        return self._columns[rank]


class Rows:
    """What every `Adapted` of a model is told of the next forward. Rows that are in no piece are the base's."""

    pieces: tuple[Piece, ...] = ()


@dataclass(frozen=True)
class Update:
    """An adapter's part of one linear: A, B times scale and gain, and the gain less 1 if it is a DoRA."""

    a_RI: Tensor
    b_RO: Tensor
    extra_O: Tensor | None


class Adapted(nn.Module):
    """A frozen linear and the stacks of its adapters."""

    def __init__(self, base: Linear, rows: Rows, *, slots: int, like: Tensor) -> None:
        super().__init__()
        self.base, self._rows, self._members = base, rows, frozenset[int]()
        self._a_SRI, self._b_SRO = like.new_zeros(slots, 0, base.in_features), like.new_zeros(slots, 0, base.out_features)
        self._extra_SO: Tensor | None = None

    @property
    def rank(self) -> int:
        """The room for ranks."""
        return self._a_SRI.shape[1]

    def forward(self, x_TI: Tensor) -> Tensor:
        y_TO: Tensor = self.base(x_TI)
        for piece in self._rows.pieces:
            if not self._members.isdisjoint(piece.members):
                self._add(y_TO[piece.rows], x_TI[piece.rows], piece)
        return y_TO

    def _add(self, y_TO: Tensor, x_TI: Tensor, piece: Piece) -> None:
        low_TC = nn.functional.linear(x_TI, self._a_SRI[piece.slots].flatten(0, 1))
        if piece.weights_TS is not None:
            low_TC.mul_(piece.columns(self.rank))
        if self._extra_SO is not None:
            extra_SO = self._extra_SO[piece.slots]
            y_TO.mul_((extra_SO if piece.weights_TS is None else piece.weights_TS.to(extra_SO.dtype) @ extra_SO) + 1)
        y_TO.addmm_(low_TC, self._b_SRO[piece.slots].flatten(0, 1))

    def put(self, slot: int, update: Update) -> None:
        """Fill an empty slot; the stacks are widened for a rank they have no room for."""
        rank, slots = len(update.a_RI), len(self._a_SRI)
        if (more := rank - self.rank) > 0:
            stacks = self._a_SRI, self._b_SRO
            self._a_SRI, self._b_SRO = (torch.cat([stack, stack.new_zeros(slots, more, stack.shape[2])], 1) for stack in stacks)
        self._a_SRI[slot, :rank], self._b_SRO[slot, :rank] = update.a_RI, update.b_RO
        if update.extra_O is not None:
            if self._extra_SO is None:
                self._extra_SO = update.extra_O.new_zeros(slots, len(update.extra_O))
            self._extra_SO[slot] = update.extra_O
        self._members |= {slot}

    def drop(self, slot: int) -> None:
        """Empty a slot."""
        for stack in (self._a_SRI, self._b_SRO, self._extra_SO):
            if stack is not None:
                stack[slot] = 0
        self._members -= {slot}


class Many:
    """The adapters over one model, in `max_loras` slots."""

    def __init__(self, model: Model, *, max_loras: int, max_lora_rank: int | None = None) -> None:
        self._model, self._max_rank = model, max_lora_rank
        self.rows = Rows()
        self._linears = {name: module for name, module in model.named_modules() if isinstance(module, Linear)}
        self._places: dict[str, Adapted] = {}
        self._max_loras, self._taken = max_loras, set[int]()
        self._told: tuple[Sequence[int | None], Sequence[int]] = (), ()
        embedding = model.model.embed_tokens.weight
        self._like = torch.empty(0, dtype=model.compute_dtype or embedding.dtype, device=embedding.device)

    @property
    def taken(self) -> list[int]:
        """The slots that hold an adapter."""
        return sorted(self._taken)

    @torch.no_grad()
    def read(self, directory: Path) -> Mapping[str, Update]:
        """The PEFT adapter in `directory`, ready for `add`. Changes nothing: it may run beside a forward, in another thread.

        Raises:
            UserError: a file is missing or damaged, or the adapter does not fit this base, or not as the base is held.
        """
        loras, trained = read_loras(directory, self._linears, self._model.config), stated(directory, "quantize")
        if not loras:
            raise UserError(f"{directory} holds no tensors of an adapter", remedy="copy the adapter again")
        rank = max(len(lora.lora_A) for lora in loras.values())
        if self._max_rank is not None and rank > self._max_rank:
            raise UserError(f"{directory} has rank {rank}, max_lora_rank is {self._max_rank}", remedy=f"start with max_lora_rank {rank}")
        for name, lora in loras.items():
            held = next((bits for bits, kind in HOLDERS.items() if isinstance(lora.base.weight, kind)), "")
            if trained not in ("", held):
                said = f"{directory} was trained over a base in {trained}, but {name} is held in {held or 'full'}"
                raise UserError(said, remedy="serve the adapter alone, which holds the base as it was trained")
        return {name: self._update(lora) for name, lora in loras.items()}

    @torch.no_grad()
    def add(self, updates: Mapping[str, Update]) -> int:
        """Put an adapter into a free slot, between two forwards; returns the slot.

        Raises:
            UserError: all are taken.
        """
        slot = next((slot for slot in range(self._max_loras) if slot not in self._taken), None)
        if slot is None:
            raise UserError(f"all {self._max_loras} slots for adapters are taken", remedy="unload one, or start with a larger max_loras")
        for name, update in updates.items():
            if name not in self._places:
                self._places[name] = Adapted(self._linears[name], self.rows, slots=self._max_loras, like=self._like)
                self._model.set_submodule(name, self._places[name])
            self._places[name].put(slot, update)
        self._taken.add(slot)
        return slot

    @torch.no_grad()
    def remove(self, slot: int) -> None:
        """Empty a slot, between two forwards; no row may name it any more."""
        for place in self._places.values():
            place.drop(slot)
        self._taken.remove(slot)

    def tell(self, slots: Sequence[int | None], counts: Sequence[int]) -> None:
        """The rows of the next forward: for each sequence in order its slot, None for the base, and how many rows it has."""
        if (slots, counts) != self._told:
            self.rows.pieces, self._told = tuple(self._pieces(slots, counts)), (slots, counts)

    def use(self, weights: Mapping[int, float]) -> None:
        """From now on every row has these weights of these slots; none = the base."""
        members, self._told = frozenset(slot for slot, weight in weights.items() if weight), ((), ())
        self.rows.pieces = ()
        if members:
            slots = _span(members)
            plain = [weights[slot] for slot in members] == [1]
            shares_S = [weights.get(slot, 0.0) for slot in range(slots.start, slots.stop)]
            wide = torch.promote_types(self._like.dtype, torch.float32)
            weights_TS = None if plain else torch.tensor([shares_S], dtype=wide, device=self._like.device)
            self.rows.pieces = (Piece(slice(None), slots, members, weights_TS),)

    def _pieces(self, slots: Sequence[int | None], counts: Sequence[int]) -> list[Piece]:
        ends, runs, last = list(accumulate(counts)), [], 0
        for slot, group in groupby(range(len(slots)), key=slots.__getitem__):
            first, last = last, ends[list(group)[-1]]
            if slot is not None:
                runs.append(Piece(slice(first, last), slice(slot, slot + 1), frozenset((slot,))))
        if len(runs) < 2:
            return runs
        members = frozenset(piece.slots.start for piece in runs)
        span, call = _span(members), _CALL.get((self._like.device.type, self._like.dtype), _CALL_ELSEWHERE)
        width = max(place.rank for place in self._places.values())
        if last * (span.stop - span.start - 1) * width > (len(runs) - 1) * call:
            return runs
        weights_TS = torch.zeros(last, span.stop - span.start)
        for piece in runs:
            weights_TS[piece.rows, piece.slots.start - span.start] = 1
        return [Piece(slice(None), span, members, weights_TS.to(self._like.device, self._like.dtype))]

    def _update(self, lora: LoRA) -> Update:
        b_RO, extra_O = lora.lora_B.T * lora.scale, None
        if isinstance(lora, DoRA):
            gain_O = lora.lora_magnitude_vector / lora.row_norms()
            b_RO, extra_O = b_RO * gain_O, gain_O - 1
        return Update(lora.lora_A.to(self._like.dtype), b_RO.to(self._like.dtype).contiguous(), extra_O)


def _span(members: frozenset[int]) -> slice:
    return slice(min(members), max(members) + 1)
