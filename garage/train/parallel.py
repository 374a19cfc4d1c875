"""One run on several processes, one per device: `torchrun --nproc-per-node 2 -m garage sft ...`.

All processes read the same steps and share out their passes (`train.batches`). The loss of a pass is divided by the learned tokens of the
whole step, so gradients are added up, never averaged, and are those of one process but for the order of the sums. All processes see the
same sums and so take the same decisions. Process 0 alone writes: events, checkpoints, artifacts. What it prepares on the disk the others
read, so the run's directory must be seen by all.

    sharding "none"   every process holds every weight; after the last pass the gradients are all-reduced, in buckets of 64 MB
    sharding "full"   FSDP2: of every weight, gradient and moment a process holds its part; a block is gathered where it is used

Not DDP: it averages, renames every weight and holds its buckets all the time. It would reduce during the last backward, and we wait.
Under FSDP2 embedding, last norm and head are one group that stays gathered until the backward ends, for the loss reads
`model.lm_head.weight` outside of the forward: one embedding a device. A model that is to be sharded is read on the CPU by every process,
then moved block by block.

Processes on one machine talk over loopback, data sockets included; they connect to the store that torchrun opened and open none. That
store listens on all interfaces, and whoever reaches its port can disturb the run: have a firewall. A process that dies ends the others
at once under gloo, by torchrun under NCCL; one that hangs ends them after `SECONDS`; without torchrun they save and stop.

Limits: fully sharded, AdamW only and no quantised base; `fit` leaves the model whole on process 0 alone, to be saved and not run; every
process reads the whole of a checkpoint. Tested with gloo on one machine.
"""

import os
import socket
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store, rendezvous  # type: ignore[attr-defined]
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from garage.core.errors import UserError
from garage.models.families import place
from garage.models.layers import Model

SECONDS = 1800.0  # the longest a process waits for another one inside a step; saving is the longest of those waits
BUCKET = 1 << 24  # numbers


class Ended(SystemExit):
    """This process stops without a word, because another one failed first and says why."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(code)
        self.reason = reason

    def __str__(self) -> str:
        return self.reason


def rank() -> int:
    """The number of this process; 0 if it is alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    """How many processes the run has."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_orphan() -> bool:
    """Whether torchrun is gone, which would have ended this process."""
    return size() > 1 and os.getppid() != _parent()


@contextmanager
def joined() -> Iterator[None]:
    """Inside, the processes that torchrun started are one group. Nothing happens to a process that is alone, or inside already.

    Raises:
        UserError: more processes than GPUs; or, later, another process was lost.
        Ended: another process failed first.
    """
    if dist.is_initialized() or "RANK" not in os.environ or os.environ.get("WORLD_SIZE") == "1":
        yield
        return
    backend, who, several = _prepare_machine(), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group(backend, store=_store(), rank=who, world_size=several, timeout=timedelta(seconds=SECONDS))
    _parent()
    try:
        yield
    except BaseException as error:
        if (meant := explained(error)) is error:
            raise
        raise meant from error
    finally:
        dist.destroy_process_group()


def leave(code: int) -> NoReturn:
    """End this process at once, after `joined`. DTensor's caches keep gloo's threads, which let go of tensors under Python's lock; one
    that asks for the lock while Python takes itself down aborts the process."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def explained(error: BaseException) -> BaseException:
    """What an error means here: itself, where a process fails first; a lost peer, in words; or the silent end of this one."""
    if not dist.is_initialized() or isinstance(error, Ended):
        return error
    if isinstance(error, RuntimeError) and ("gloo" in str(error) or isinstance(error, dist.DistError)):
        remedy = "look above for the reason; then go on with --resume, with any number of processes"
        error = UserError(f"process {rank()} of {size()} lost another one: it ended, or was silent for {SECONDS:g} s", remedy=remedy)
    code = 130 if isinstance(error, KeyboardInterrupt) else 2 if isinstance(error, UserError) else 1
    try:
        first, _, reason = _store().compare_set("failed", "", f"{rank()} {error}").decode().partition(" ")
    except RuntimeError:  # the store went with torchrun itself
        return error
    return error if int(first) == rank() else Ended(code, reason)


@contextmanager
def leading(name: str) -> Iterator[None]:
    """Process 0 does what is inside; then the others do, with what it left on the disk. They wait for as long as it takes."""
    while rank() and not _store().check([name]):
        if _store().check(["failed"]):
            raise Ended(2, _store().get("failed").decode())
        time.sleep(0.05)
    yield
    if size() > 1 and rank() == 0:
        _store().set(name, "done")


def totals(*values: float) -> list[float]:
    """Each number summed over all processes; without numbers, a place to meet."""
    summed = torch.tensor([*values, 0.0], dtype=torch.float64)
    return add_up(summed)[:-1].tolist()


def add_up(tensor: Tensor) -> Tensor:
    """A tensor summed over all processes, in place."""
    if size() > 1:
        dist.all_reduce(tensor)
    return tensor


def add_gradients(weights: Iterable[Tensor]) -> None:
    """Every gradient summed over all processes; FSDP2 has summed those of its parts already."""
    for bucket in _buckets(weight for weight in weights if not isinstance(weight, DTensor)) if size() > 1 else ():
        flat = torch.cat([(torch.zeros_like(w) if w.grad is None else w.grad).flatten() for w in bucket])
        for weight, grad in zip(bucket, add_up(flat).split([w.numel() for w in bucket]), strict=True):  # type: ignore[no-untyped-call]
            weight.grad = grad.view_as(weight)


def gathered(state: Tensor) -> list[Tensor]:
    """A tensor on the CPU as each process has it."""
    if size() == 1:
        return [state]
    parts = [torch.empty_like(state) for _ in range(size())]
    dist.all_gather(parts, state)
    return parts


def shard(model: Model, device: torch.device) -> None:
    """Leave a part of every weight on this process, on `device`; a model that is sharded already only lets go of what it gathered."""
    if isinstance(model, FSDPModule):
        model.reshard()
        return
    if size() == 1:
        model.to(device)
        return
    mesh = init_device_mesh(device.type, (size(),))
    for module in (*model.model.layers, model):
        part = fully_shard(module, mesh=mesh, reshard_after_forward=module is not model)
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on every process."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """A copy of a whole tensor, or of the part of it that this process holds of `like`, on the device of `like`."""
    if not isinstance(like, DTensor):
        return tensor.to(like.device, copy=True)
    return torch.zeros_like(like).copy_(distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None))


def collected(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All of every tensor on process 0, where a sharded one lies on the CPU; nothing on the others."""
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        full = whole(tensor).cpu() if isinstance(tensor, DTensor) else tensor
        out |= {} if rank() else {name: full}
    return out


def assemble(model: Model, trained: Mapping[str, Tensor]) -> None:
    """Make the trained weights of a sharded model whole on process 0."""
    if isinstance(model, FSDPModule):
        for name, tensor in collected(trained).items():
            place(model, name, tensor)
        model.tie()


def _prepare_machine() -> str:
    """Choose the device and, on a single machine, loopback; returns the backends."""
    local, here = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
    if here == int(os.environ["WORLD_SIZE"]):
        loopback = next((name for _, name in socket.if_nameindex() if name in ("lo", "lo0")), "lo")
        os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = loopback
    if not torch.cuda.is_available():
        return "gloo"
    if local >= torch.cuda.device_count():
        remedy = f"--nproc-per-node {torch.cuda.device_count()}, or hide the GPUs (CUDA_VISIBLE_DEVICES=) and train on the CPU"
        raise UserError(f"{here} processes on a machine with {torch.cuda.device_count()} GPUs", remedy=remedy)
    torch.cuda.set_device(local)
    return "cpu:gloo,cuda:nccl"


@cache
def _parent() -> int:
    """Who started this process, at the first call."""
    return os.getppid()


@cache
def _store() -> Store:
    """The processes' common notes, kept by torchrun, which may start the processes again."""
    return PrefixStore(f"garage.{os.environ.get('TORCHELASTIC_RESTART_COUNT')}", next(rendezvous("env://"))[0])


def _buckets(weights: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Weights in order, at most BUCKET numbers together, or one."""
    bucket: list[Tensor] = []
    for weight in weights:
        if bucket and sum(w.numel() for w in bucket) + weight.numel() > BUCKET:
            yield bucket
            bucket = []
        bucket.append(weight)
    if bucket:
        yield bucket
