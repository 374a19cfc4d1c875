"""How much memory and how many threads: what the machine has, what a run used, and activation checkpointing.

With checkpointing a block keeps its input only and is run again in the backward pass: about a third more time, and memory for one
block instead of all (Chen et al., arXiv 1604.06174). The random state is kept, so dropout masks and gradients are the same.
"""

import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import psutil
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


@contextmanager
def recomputed(blocks: nn.ModuleList, wanted: bool) -> Iterator[None]:
    """Inside, the forward pass of each block is checkpointed if `wanted`."""
    for block in blocks if wanted else ():
        block.forward = partial(checkpoint, type(block).forward.__get__(block), use_reentrant=False)
    try:
        yield
    finally:
        for block in blocks if wanted else ():
            del block.forward


def threads_or_cores(threads: int | None) -> int:
    """`threads`, or one per physical core; never more than the process may use or torch was told to (OMP_NUM_THREADS)."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return threads or min(usable, psutil.cpu_count(logical=False) or usable, torch.get_num_threads())


def used_bytes(device: torch.device) -> int:
    """Memory in use now: of the process on CPU, of torch on a GPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else int(psutil.Process().memory_info().rss)


def peak_bytes(device: torch.device) -> int:
    """The most memory used since the process began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
