"""How much memory and how many threads: what the machine has, and what a run used."""

import gc
import os
import resource
import sys

import psutil
import torch


def threads_or_cores(threads: int | None) -> int:
    """`threads`, or one per physical core; never more than the process may use or torch was told to (OMP_NUM_THREADS)."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return threads or min(usable, psutil.cpu_count(logical=False) or usable, torch.get_num_threads())


def used_bytes(device: torch.device) -> int:
    """Memory in use now: of the process on CPU, of torch on a GPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else int(psutil.Process().memory_info().rss)


def free_bytes(device: torch.device) -> int:
    """Memory that may still be taken, less a tenth for what nobody counts."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return int(0.9 * free)


def release(device: torch.device) -> None:
    """Give back what is held for reuse."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def peak_bytes(device: torch.device) -> int:
    """The most memory used since the process began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
