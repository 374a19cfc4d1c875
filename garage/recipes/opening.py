"""A model opened for answering: what it will hold, counted before anything is read, and its adapters.

The weights are counted by the very code that lays them out, on tensors without numbers, and the cache by the engine's own arithmetic;
adapters as the room for as many of the largest rank as may be loaded. A step's logits and activations are an estimate from its sizes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import psutil
import torch

from garage.core.errors import UserError
from garage.engine.engine import Engine
from garage.engine.runner import Room
from garage.models.config import Config
from garage.models.families import build
from garage.models.fuse import lay_out
from garage.models.layers import Linear
from garage.specs.serve import EngineSpec
from garage.store.locate import Located

CUDA_CONTEXT = 500_000_000  # context, cuBLAS and the allocator's waste; an estimate
LEAST_CACHE = 1 << 24


@dataclass(frozen=True)
class Holding:
    """Bytes by name, and the tokens the cache has room for; `longest` is the longest request."""

    items: Mapping[str, int]
    tokens: int
    longest: int

    @property
    def total(self) -> int:
        return sum(self.items.values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size(count)}" for name, count in self.items.items())
        return f"{size(self.total)} ({parts}); {self.tokens:,} tokens, {self.tokens // self.longest} requests of {self.longest}"


def dtype_of(config: Config, settings: EngineSpec) -> torch.dtype:
    """The precision of the weights."""
    found: torch.dtype = getattr(torch, (config.dtype or "bfloat16") if settings.dtype == "auto" else settings.dtype)
    return found


def holding(config: Config, settings: EngineSpec, device: str) -> Holding:
    """What an engine of these settings holds on `device`."""
    dtype = dtype_of(config, settings)
    model = lay_out(build(config, dtype=dtype, device="meta"), settings.quantization, device=device)
    held = {id(t): t for m in model.modules() for t in (*m.parameters(recurse=False), *m.buffers(recurse=False), *getattr(m, "tiles", ()))}
    weights = sum(tensor.nbytes for tensor in held.values())
    linears = [m for m in model.model.layers.modules() if isinstance(m, Linear)] if settings.enable_lora else []
    adapters = dtype.itemsize * settings.max_loras * settings.max_lora_rank * sum(m.in_features + m.out_features for m in linears)
    room = Room.of(config, settings, dtype)
    activations = dtype.itemsize * settings.max_num_batched_tokens * (4 * config.hidden_size + 3 * config.intermediate_size)
    step = 4 * settings.max_num_seqs * config.vocab_size + activations
    process = CUDA_CONTEXT if device == "cuda" else psutil.Process().memory_info().rss
    cache = room.num_pages * room.page_bytes
    items = {"weights": weights, "adapters": adapters, "keys and values": cache, "a step": step, "process": process}
    return Holding({name: count for name, count in items.items() if count}, room.tokens, room.longest)


def require_room(found: Holding, device: str) -> None:
    """Refuse what does not fit into the memory that is free.

    Raises:
        UserError: it does not; what to change is named.
    """
    free = torch.cuda.mem_get_info()[0] + CUDA_CONTEXT if device == "cuda" else psutil.virtual_memory().available
    free += 0 if device == "cuda" else psutil.Process().memory_info().rss
    cache = free - found.total + found.items["keys and values"]
    if found.total <= free:
        return
    smaller = f"--engine.kv_cache_bytes {cache}" if cache >= LEAST_CACHE else "--engine.quantization int8 or int4"
    raise UserError(f"the server would hold {found}, and {size(free)} are free", remedy=f"try {smaller}, or a smaller model")


def open_engine(
    source: Located, settings: EngineSpec, lora_modules: Sequence[str] = (), tell: Callable[[str], None] = lambda phase: None
) -> Engine:
    """The engine of a model, with adapters over it, each given as name=PLACE.

    Raises:
        UserError: something is missing, damaged or of another model, or a name is used twice.
    """
    pairs = [pair.partition("=") for pair in lora_modules]
    if bad := [name for name, _, place in pairs if not name or not place or name == source.name]:
        message = f"lora_modules: {bad[0]!r} is no name=DIRECTORY, or it is the name of the model"
        raise UserError(message, remedy="write --lora_modules code=runs/code")
    engine = Engine.open(source.base, source.adapter, with_adapters(settings, len(pairs)), tell=tell)
    for name, _, place in pairs:
        tell(f"adapter {name}")
        engine.load_adapter(name, place)
    return engine


def with_adapters(settings: EngineSpec, count: int) -> EngineSpec:
    """The settings with room for that many adapters."""
    return settings.model_copy(update={"enable_lora": True, "max_loras": max(count, settings.max_loras)}) if count else settings


def size(count: int) -> str:
    """Bytes in words."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
