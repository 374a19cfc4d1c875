"""Live and peak bytes of a stretch of PyTorch, to the byte, on any device and on `meta`, where a program costs neither memory nor time.

A dispatch mode sees every operator. A storage is counted when it first appears in an output and uncounted when it dies, under the name of
the phase it was born in.

Limits: tensors only. The libraries' own memory (a CUDA context, oneDNN's packed weights), fragmentation, and what an operator allocates and
frees inside are not seen.
"""

import weakref
from collections import Counter
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GRAIN = 512  # blocks of the CUDA allocator are multiples of this


class ByteCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the storages that are born inside; `resident` tensors were there before and cost nothing here.

    Attributes:
        phase: what storages born from now on are counted under.
        now, peak: live bytes, and the most there were.
        at_peak: the bytes that were live then, by phase.
        flop: of the matrix products.
    """

    def __init__(self, resident: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._kept = [tensor.untyped_storage() for tensor in resident]  # held, so that their ids stay theirs
        self._live: dict[int, tuple[int, str, int]] = {id(storage): (0, "", 0) for storage in self._kept}
        self.phase, self.now, self.peak, self.flop = "", 0, 0, 0
        self._born, self._peak_at = 0, 0
        self._by_phase: Counter[str] = Counter()
        self.at_peak: Mapping[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_):
            self.flop += 2 * args[-2].shape[0] * args[-2].shape[1] * args[-1].shape[1]
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._add(tensor.untyped_storage())
        return out

    def born_by_peak(self, tensors: Iterable[Tensor | None]) -> int:
        """Bytes of those tensors, alive now, that were there when most was."""
        entries = {id(t.untyped_storage()): self._live[id(t.untyped_storage())] for t in tensors if t is not None}
        return sum(size for size, _, born in entries.values() if born <= self._peak_at)

    def _add(self, storage: torch.UntypedStorage) -> None:
        if id(storage) in self._live:
            return
        size = -(-storage.nbytes() // GRAIN) * GRAIN
        self._born += 1
        self._live[id(storage)] = size, self.phase, self._born
        weakref.finalize(storage, self._free, id(storage))
        self.now += size
        self._by_phase[self.phase] += size
        if self.now > self.peak:
            self.peak, self.at_peak, self._peak_at = self.now, dict(self._by_phase), self._born

    def _free(self, key: int) -> None:
        size, phase, _ = self._live.pop(key)
        self.now -= size
        self._by_phase[phase] -= size
