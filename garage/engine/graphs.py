"""Decoding as CUDA graphs: a step of one token for each of B sequences is one launch, where it was some hundred.

A graph replays fixed kernels on fixed memory, from a row's few numbers to its next token: block tables and last tokens are on the device
(`engine.batch`), the head and the choice of the token are in the graph. A step copies its rows into buffers that stay; a graph is captured
for each of a few batch sizes when it is first needed. A smaller batch is padded: a padded row belongs to no sequence, its page is a scratch
page, and its result is cut off. Graphs share one pool of memory; the result of a step is valid until the next.

Limits: rows of one token and of the base model, without adapters; weights may be refilled, but not replaced. Choices with filters, rules or
a form are made after the graph, from its logits.
"""

from collections.abc import Callable, Sequence
from itertools import count, takewhile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from garage.engine.batch import Batcher
from garage.engine.request import Row
from garage.engine.rules import hosted
from garage.engine.sampler import Picked, heats, pick, uniforms
from garage.engine.scheduler import Slice
from garage.kernels.paths import has_dots
from garage.models.attend import PagedAttend
from garage.models.layers import Model

Pools = tuple[Sequence[Tensor], Sequence[Tensor]]
Results = tuple[Tensor, ...]


class CudaGraph:
    """A call captured on the GPU; `out` is where its results are each time. It is made twice before, so that kernels are compiled: it must
    not change what it reads."""

    def __init__(self, call: Callable[[], Results], pool: object) -> None:
        self._graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call(), call()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(self._graph, pool=pool):  # type: ignore[arg-type]
            self.out = call()

    def replay(self) -> None:
        self._graph.replay()


def sizes(most: int) -> list[int]:
    """Batch sizes that have a graph: 1, 2, 4, 8, 16, 24, ..., and the largest."""
    return [*takewhile(lambda size: size < most, (1, 2, 4)), *takewhile(lambda size: size < most, count(8, 8)), most]


class Graphs:
    """`step(size, is_drawn)` computes the first `size` rows of the buffers; rows beyond a batch's own are pads."""

    def __init__(
        self, step: Callable[[int, bool], Results], buffers: Sequence[Tensor], pads: Sequence[Sequence[float]], *, capture: type[CudaGraph]
    ) -> None:
        self._step, self._buffers, self._pads, self._capture = step, buffers, pads, capture
        self._sizes, self._made = sizes(len(buffers[0])), dict[tuple[int, bool], CudaGraph]()
        self._pool = torch.cuda.graph_pool_handle() if buffers[0].is_cuda else None

    def run(self, inputs: Sequence[NDArray[np.generic]], is_drawn: bool) -> Results:
        """The step's results for the rows of `inputs`, one array for each buffer."""
        rows = len(inputs[0])
        size = next(size for size in self._sizes if size >= rows)
        for buffer, given, pad in zip(self._buffers, inputs, self._pads, strict=True):
            padded = np.concatenate([given, np.broadcast_to(np.array(pad, given.dtype), (size - rows, len(pad)))])
            buffer[:size].copy_(hosted(padded, buffer), non_blocking=True)
        key = (size, is_drawn)
        if key not in self._made:
            self._made[key] = self._capture(lambda: self._step(*key), self._pool)
        self._made[key].replay()
        return tuple(each[:rows] for each in self._made[key].out)


class Decoding:
    """A model's step of one token for each sequence, up to the logits [B, V] and the choice; the batcher's spare line is for pads."""

    def __init__(self, model: Model, pools: Pools, batcher: Batcher, vocab_size: int, *, capture: type[CudaGraph] = CudaGraph) -> None:
        self._model, self._pools, self._batcher, self._vocab_size = model, pools, batcher, vocab_size
        most, place = len(batcher.last_ids), batcher.last_ids.device
        pads = ((most - 1, 0, 0), (0.0, 0.0))
        kinds = zip(pads, (torch.int64, torch.float64), strict=True)
        self._buffers = [torch.tensor([pad] * (most - 1), dtype=kind, device=place) for pad, kind in kinds]
        self._graphs = Graphs(self._step, self._buffers, pads, capture=capture)

    def run(self, slices: Sequence[Slice], rows: Sequence[Row]) -> tuple[Tensor, Picked | None]:
        """The logits after the last token of each sequence, and what is chosen if that is a matter of temperature alone."""
        self._batcher.note_pages(slices)
        numbers = np.array([(part.sequence.row, part.start, part.sequence.tokens[part.start]) for part in slices])
        heat_B = heats(rows)
        is_drawn = heat_B is not None and bool(heat_B.any())
        u_B = uniforms([s.seed for s, _ in rows], [length for _, length in rows]) if is_drawn else np.zeros(len(rows))
        draws = np.stack([np.zeros(len(rows)) if heat_B is None else heat_B, u_B], axis=1)
        logits_BV, *picked = self._graphs.run((numbers, draws), is_drawn)
        return logits_BV, None if heat_B is None else Picked(*picked)

    def _step(self, size: int, is_drawn: bool) -> Results:
        numbers, draws = (buffer[:size] for buffer in self._buffers)
        lines_B, positions_B, tokens_B = numbers.unbind(1)
        contexts_B, batcher = positions_B + 1, self._batcher
        on_host = () if numbers.is_cuda else tuple(contexts_B.tolist())  # the kernels of a GPU read them where they are
        tables = batcher.tables(lines_B, torch.arange(size, device=numbers.device), positions_B)
        attend = PagedAttend(*self._pools, tables, (1,) * size, on_host, contexts_B)
        logits_BV = self._model.logits(self._model(batcher.known(tokens_B, lines_B), positions_B, attend))
        return logits_BV, *pick(logits_BV[:, : self._vocab_size], draws if is_drawn else None)


def can_capture(weight: Tensor) -> bool:
    """Whether the kernels of a step read all that changes from step to step on the device."""
    return has_dots(weight)
