"""Decoding as CUDA graphs: a step of one token for each of B sequences is one launch, where it was some hundred.

A graph replays fixed kernels on fixed memory, so a step's inputs are copied into buffers that stay, and a graph is captured for each of a
few batch sizes when it is first needed. A smaller batch is padded: a padded row reads and writes a scratch page that no sequence owns, and
its result is cut off. Graphs share one pool of memory; the result of a step is valid until the next.

Limits: rows of one token and of the base model, without adapters; weights may be refilled, but not replaced.
"""

from collections.abc import Callable, Sequence
from itertools import count, takewhile

import torch
from torch import Tensor

from garage.engine.batch import StepBatch
from garage.kernels.paths import has_dots
from garage.models.attend import PagedAttend, PageTable
from garage.models.layers import Model

Pools = tuple[Sequence[Tensor], Sequence[Tensor]]


class CudaGraph:
    """A call captured on the GPU; `out` is where its result is each time. It is made twice before, so that kernels are compiled."""

    def __init__(self, call: Callable[[], Tensor], pool: object) -> None:
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
    """`step(size)` computes the first `size` rows of the buffers; rows beyond a batch's own hold the pads."""

    def __init__(self, step: Callable[[int], Tensor], buffers: Sequence[Tensor], pads: Sequence[int], *, capture: type[CudaGraph]) -> None:
        self._step, self._buffers, self._pads, self._capture = step, buffers, pads, capture
        self._sizes, self._made = sizes(len(buffers[0])), dict[int, CudaGraph]()
        self._pool = torch.cuda.graph_pool_handle() if buffers[0].is_cuda else None

    def run(self, inputs: Sequence[Tensor]) -> Tensor:
        """The step's result for the rows of `inputs`, one tensor for each buffer; narrower ones fill their first columns."""
        rows = len(inputs[0])
        size = next(size for size in self._sizes if size >= rows)
        for buffer, given, pad in zip(self._buffers, inputs, self._pads, strict=True):
            (buffer[:rows, : given.shape[1]] if given.ndim == 2 else buffer[:rows]).copy_(given)
            buffer[rows:size] = pad
        if size not in self._made:
            self._made[size] = self._capture(lambda: self._step(size), self._pool)
        self._made[size].replay()
        return self._made[size].out[:rows]


class Decoding:
    """A model's step of one token for each sequence, up to the logits [B, V]. `table_of` says which of its page tables each layer reads;
    the scratch page is the last of the pools."""

    def __init__(
        self, model: Model, pools: Pools, table_of: Sequence[int], *, most: int, width: int, capture: type[CudaGraph] = CudaGraph
    ) -> None:
        self._model, self._pools, self._table_of = model, pools, table_of
        pages, page_size = pools[0][0].shape[:2]
        place, num_tables = pools[0][0].device, max(table_of) + 1
        pads = (0, 0, 1, *((pages - 1) * page_size, pages - 1) * num_tables)
        wide = (False,) * 3 + (False, True) * num_tables
        shapes = [(most, width) if is_wide else (most,) for is_wide in wide]
        self._buffers = [torch.full(shape, pad, device=place) for shape, pad in zip(shapes, pads, strict=True)]
        self._graphs = Graphs(self._step, self._buffers, pads, capture=capture)

    def run(self, batch: StepBatch) -> Tensor:
        """The logits of a batch whose sequences have one row each, the last of theirs."""
        contexts_B = torch.tensor(batch.contexts, device=batch.tokens_T.device)
        tables = (batch.tables[self._table_of.index(number)] for number in range(max(self._table_of) + 1))
        places = [tensor for table in tables for tensor in (table.slots_T, table.tables_BP)]
        return self._graphs.run((batch.tokens_T, batch.positions_T, contexts_B, *places))

    def _step(self, size: int) -> Tensor:
        tokens, positions, contexts, *places = (buffer[:size] for buffer in self._buffers)
        on_host = () if tokens.is_cuda else tuple(contexts.tolist())  # the kernels of a GPU read them where they are
        tables = [PageTable(*pair) for pair in zip(places[::2], places[1::2], strict=True)]
        attend = PagedAttend(*self._pools, [tables[number] for number in self._table_of], (1,) * size, on_host, contexts)
        return self._model.logits(self._model(tokens, positions, attend))


def can_capture(weight: Tensor) -> bool:
    """Whether the kernels of a step read all that changes from step to step on the device."""
    return has_dots(weight)
