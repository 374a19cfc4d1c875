"""Rows of a dataset as batches: which rows, in which order, cut where, packed how.

A row of n tokens has n - 1 places where a next token can be learned. Its input stops at the last place whose target is learned: what comes
after could change no loss. The inputs of many rows are laid end to end without padding; the bounds keep documents from seeing each
other, and positions start again at 0 in each.

An epoch is cut into the same number of steps whatever its order, each holding about `batch_tokens`, to within one row. A step is spread
over as few passes as fit into `micro_tokens`, evenly. So `micro_tokens` is a matter of memory alone: it never changes which
rows meet in a step and, since the loss is divided by the learned tokens of the whole step, not the gradient either.

Rows may come in groups, such as a better and a worse answer: a group is never parted, and is left out if one of its rows has nothing to
learn.

The order of epoch e depends on the seed and e only. A position in the data is therefore two numbers, which is all a resumed run needs.
Nothing is dropped silently: the ledger counts what was cut (with the learned tokens among it) and rows without anything to learn.

A pass is filled up to a multiple of 64 places by a document of its own in which nothing is learned. Products of bfloat16 matrices are
compiled for each shape on CPU (14 ms and 6 MB for a length not seen before), so few different lengths are worth a few idle places.

Shape suffix: T packed tokens.
"""

import copy
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, pairwise

import numpy as np
import torch
from torch import Tensor

from garage.core.errors import UserError
from garage.core.seeds import derive
from garage.kernels.loss import IGNORED
from garage.models.batch import PackedBatch
from garage.specs.train import FitSpec
from garage.store.dataset import Encoded

MULTIPLE = 64  # passes are filled up to a multiple of this, see above
BLOCK = 1 << 14  # rows looked at together while counting; bounds the memory


@dataclass(frozen=True)
class Ledger:
    """What became of the rows of a split."""

    rows: int
    empty_rows: int
    truncated_rows: int
    truncated_tokens: int
    truncated_learned: int
    longest: int
    input_tokens: int
    learned_tokens: int


@dataclass(frozen=True)
class Cursor:
    """A place in the data: the next step of an epoch. It is always a step that exists."""

    epoch: int = 0
    step: int = 0


@dataclass(frozen=True)
class Micro:
    """One forward pass: the token to be found at each place, or IGNORED; how many places, or groups of rows, count; and which rows."""

    packed: PackedBatch
    targets_T: Tensor
    learned: int
    rows: np.ndarray


@dataclass(frozen=True)
class Step:
    """One optimizer step: its passes, its input tokens and its learned tokens."""

    micros: tuple[Micro, ...]
    tokens: int
    learned: int


class Batches:
    """A split, ready to be read in steps; `group` rows that follow each other belong together.

    Raises:
        UserError: no row has anything to learn.
    """

    def __init__(
        self, data: Encoded, *, max_length: int, batch_tokens: int, micro_tokens: int, device: torch.device, group: int = 1
    ) -> None:
        self._data, self._batch, self._micro, self._device, self._group = data, batch_tokens, micro_tokens, device, group
        self._lengths, self.ledger = survey(data, max_length)
        grouped = self._lengths.reshape(-1, group)
        self._inputs = np.where(grouped.all(1), grouped.sum(1), 0)
        self._rows = np.flatnonzero(self._inputs)  # numbers of groups; of rows, where a group is one row
        if not len(self._rows):
            none = f"none of the {len(data)} rows has a token to learn"
            raise UserError(none, remedy="check the dataset's roles, or raise --fit.max_length")
        self.steps_per_epoch = min(len(self._rows), -(-int(self._inputs.sum()) // batch_tokens))

    @property
    def longest(self) -> int:
        """Tokens of the longest row, or group of rows, that a pass must hold."""
        return int(self._inputs.max())

    def in_passes_of(self, tokens: int) -> "Batches":
        """The same steps in other passes."""
        other = copy.copy(self)
        other._micro = tokens
        return other

    def after(self, cursor: Cursor) -> Cursor:
        """The place one step on."""
        ended = cursor.step + 1 == self.steps_per_epoch
        return Cursor(cursor.epoch + 1, 0) if ended else Cursor(cursor.epoch, cursor.step + 1)

    def steps(self, seed: int, cursor: Cursor) -> Iterator[Step]:
        """Shuffled steps from `cursor` on, epoch after epoch, without end."""
        while True:
            order = np.random.default_rng(derive(seed, "order", cursor.epoch)).permutation(self._rows)
            cuts = _cuts(self._inputs[order], self.steps_per_epoch)
            for first, last in islice(pairwise(cuts), cursor.step, None):
                yield self._step(order[first:last])
            cursor = Cursor(cursor.epoch + 1, 0)

    def in_order(self) -> Iterator[Step]:
        """Every row once, in the order of the dataset."""
        cuts = _cuts(self._inputs[self._rows], self.steps_per_epoch)
        for first, last in pairwise(cuts):
            yield self._step(self._rows[first:last])

    def _step(self, rows: np.ndarray) -> Step:
        micros = tuple(self._pack(group) for group in spread(rows, self._inputs[rows], self._micro))
        return Step(micros, int(self._inputs[rows].sum()), sum(micro.learned for micro in micros))

    def _pack(self, groups: np.ndarray) -> Micro:
        rows = (groups[:, None] * self._group + np.arange(self._group)).ravel()
        lengths = self._lengths[rows]
        bounds = np.concatenate([[0], np.cumsum(lengths)])
        positions = np.arange(bounds[-1]) - np.repeat(bounds[:-1], lengths)
        places = np.repeat(self._data.bounds[rows], lengths) + positions
        is_learned = self._data.learned[places + 1] != 0
        targets = np.where(is_learned, self._data.tokens[places + 1].astype(np.int64), IGNORED)
        if fill := -int(bounds[-1]) % MULTIPLE:
            bounds, positions = np.append(bounds, bounds[-1] + fill), np.append(positions, np.arange(fill))
        offsets = torch.from_numpy(bounds.astype(np.int32))  # read on the CPU only
        packed = PackedBatch(self._tensor(self._data.tokens[places], fill, 0), self._tensor(positions, 0, 0), offsets)
        counted = int(is_learned.sum()) if self._group == 1 else len(groups)
        return Micro(packed, self._tensor(targets, fill, IGNORED), counted, rows)

    def _tensor(self, values: np.ndarray, fill: int, value: int) -> Tensor:
        return torch.from_numpy(np.append(values.astype(np.int64), np.full(fill, value))).to(self._device)


def read_batches(data: Encoded, spec: FitSpec, device: torch.device, *, batch_tokens: int, group: int = 1) -> Batches:
    """A split as the settings of a run say."""
    return Batches(data, max_length=spec.max_length, batch_tokens=batch_tokens, micro_tokens=spec.micro_tokens, device=device, group=group)


def survey(data: Encoded, max_length: int) -> tuple[np.ndarray, Ledger]:
    """The input length of every row (0 = nothing to learn), and the ledger. Reads the learned flags once, a block of rows at a time."""
    lengths = np.minimum(data.lengths, max_length)
    inputs, learned, cut_learned = np.zeros(len(data), np.int64), 0, 0
    for first in range(0, len(data), BLOCK):
        block = slice(first, min(first + BLOCK, len(data)))
        start, stop = data.bounds[block], data.bounds[block] + lengths[block]
        base, end = int(start[0]), int(data.bounds[block.stop])
        flags = np.flatnonzero(np.asarray(data.learned[base:end])) + base
        if not len(flags):
            continue
        upto, since = np.searchsorted(flags, stop), np.searchsorted(flags, start + 1)
        inputs[block] = np.where(upto > since, flags[np.maximum(upto - 1, 0)] - start, 0)
        learned += int((upto - since).clip(0).sum())
        cut_learned += int((np.searchsorted(flags, data.bounds[first + 1 : block.stop + 1]) - upto).sum())
    cut = data.lengths - lengths
    longest = int(data.lengths.max(initial=0))
    counts = (len(data), int((inputs == 0).sum()), int((cut > 0).sum()), int(cut.sum()), cut_learned, longest, int(inputs.sum()), learned)
    return inputs, Ledger(*counts)


def spread(rows: np.ndarray, lengths: np.ndarray, budget: int) -> list[np.ndarray]:
    """`rows` in as few groups of at most `budget` tokens as the greedy rule finds: longest first, each into the emptiest group."""
    for count in range(-(-int(lengths.sum()) // budget), len(rows) + 1):
        groups: list[list[int]] = [[] for _ in range(count)]
        sizes = np.zeros(count, np.int64)
        for at in np.argsort(-lengths, kind="stable"):
            emptiest = int(sizes.argmin())
            groups[emptiest].append(int(at))
            sizes[emptiest] += lengths[at]
        if sizes.max() <= budget:
            return [rows[sorted(group)] for group in groups]
    raise AssertionError(f"a row of {lengths.max()} tokens does not fit into {budget}")


def fingerprint(data: Encoded) -> str:
    """A hash of a split's rows: a run may only be resumed on the data it was started with."""
    digest = hashlib.blake2b(digest_size=16)
    for array in (data.bounds, data.learned, data.tokens):
        for first in range(0, len(array), 1 << 22):
            digest.update(np.ascontiguousarray(array[first : first + (1 << 22)]).data)
    return digest.hexdigest()


def _cuts(lengths: np.ndarray, steps: int) -> np.ndarray:
    """Where to cut rows into `steps` parts of about equal tokens, none of them empty."""
    ends, every = np.cumsum(lengths), np.arange(steps + 1)
    cuts = np.searchsorted(ends - lengths / 2, every * (ends[-1] / steps))
    cuts = np.maximum.accumulate(cuts - every) + every
    return np.minimum(cuts, len(lengths) - steps + every)  # type: ignore[no-any-return]
