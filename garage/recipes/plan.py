"""`garage plan`: what a training or a server takes, item by item, before it starts; and what to change where it does not fit.

The figures are those of the very step, counted on tensors without numbers (`train.budget`), so a model that is not here can be planned by
its published size, and a GPU that is not here by `--device cuda`. While looking for what fits, deep models are counted with two and four
layers and the line through both; what is reported is counted whole.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import psutil
import torch

from garage.core.errors import UserError
from garage.core.events import Listener
from garage.engine.layout import Layout
from garage.engine.runner import held_in
from garage.models.config import Config
from garage.models.families import build, config_of, named
from garage.models.layers import Linear, Model
from garage.models.quantize import hold_embedding, quantised
from garage.recipes.opening import dtype_of, holding, size, with_adapters
from garage.recipes.tune import adapted
from garage.specs.plan import PlanSpec, size_in_bytes
from garage.specs.serve import EngineSpec
from garage.specs.train import AdamW8Spec, AdamWSpec, FitSpec, FullSpec, LoRASpec
from garage.store.locate import locate
from garage.train.budget import Budget, layers_to_recompute, needed, step_budget

FEW, LEAST_RANK, MOST_RANK, SHORTEST = 4, 8, 64, 256
BAR = 30


@dataclass(frozen=True)
class Item:
    """A part of the memory."""

    name: str
    bytes: int


@dataclass(frozen=True)
class Suggestion:
    """Settings to change, and the whole that is taken then."""

    options: tuple[str, ...]
    total_bytes: int
    fits: bool


@dataclass(frozen=True)
class Plan:
    """What is taken and what there is. `seconds_per_step` is that of the products alone, at the rate measured here; None elsewhere."""

    total_bytes: int
    items: tuple[Item, ...]
    room_bytes: int
    fits: bool
    layers_computed_again: int
    seconds_per_step: float | None
    suggestions: tuple[Suggestion, ...]


def plan(spec: PlanSpec, *_: Listener) -> Plan:
    """Count it, print it, and look for what fits.

    Raises:
        UserError: there is no such model.
    """
    config, device = _config(spec.model), _device(spec)
    found = _serving(spec, config, device) if spec.verb == "serve" else _training(spec, config, device)
    _show(found)
    return found


def _training(spec: PlanSpec, config: Config, device: str) -> Plan:
    room = _room(spec, device)
    whole, layers = _counted(spec, config, device, room)
    seconds = _seconds(spec.fit, whole.flop) if device == ("cuda" if torch.cuda.is_available() else "cpu") else None
    fits = whole.total <= room
    changes = _larger if fits else _smaller
    suggestions = _walk(spec, config, device, room, changes) if spec.fill or not fits else ()
    items = tuple(Item(name, count) for name, count in whole.items.items())
    return Plan(whole.total, items, room, fits, layers, seconds, suggestions)


def _walk(
    spec: PlanSpec, config: Config, device: str, room: int, changes: Callable[[PlanSpec, str], Iterator[tuple[str, PlanSpec]]]
) -> tuple[Suggestion, ...]:
    """Take one change after the other: downwards until it fits, upwards as long as it does."""
    options: dict[str, str] = {}
    is_down, total = changes is _smaller, 0
    while True:
        tried = ((words, other, _estimated(other, config, device, room)) for words, other in changes(spec, device))
        found = next(((words, other) for words, other, estimate in tried if is_down or estimate <= room), None)
        if found is None:
            break
        words, spec = found
        options |= {option.split()[0]: option for option in words.split(", ")}
        if is_down and _estimated(spec, config, device, room) <= room and (total := _counted(spec, config, device, room)[0].total) <= room:
            break
    total = total or _counted(spec, config, device, room)[0].total
    return (Suggestion(tuple(options.values()), total, total <= room),) if options else ()


def _smaller(spec: PlanSpec, device: str) -> Iterator[tuple[str, PlanSpec]]:
    """What can be given up, the harmless first."""
    fit, lora = spec.fit, spec.adapter
    if fit.checkpointing == "off":
        yield "--fit.checkpointing all", _fit(spec, checkpointing="all")
    if fit.micro_tokens > fit.max_length:
        micro = max(fit.max_length, fit.micro_tokens // 2)
        yield f"--fit.micro_tokens {micro}", _fit(spec, micro_tokens=micro)
    if isinstance(fit.optimizer, AdamWSpec) and not isinstance(fit.optimizer, AdamW8Spec):
        lean = AdamW8Spec.model_validate(fit.optimizer.model_dump() | {"kind": "adamw8"})
        yield "--fit.optimizer.kind adamw8", _fit(spec, optimizer=lean)
    if fit.tile is None and fit.micro_tokens > 1024:
        yield "--fit.checkpointing all, --fit.tile 1024", _fit(spec, checkpointing="all", tile=1024)
    if device == "cuda" and not fit.offload:
        yield "--fit.checkpointing all, --fit.offload true", _fit(spec, checkpointing="all", offload=True)
    if isinstance(lora, FullSpec):
        yield "--adapter.kind lora", spec.model_copy(update={"adapter": LoRASpec()})
        return
    if lora.quantize == "none":
        yield "--adapter.quantize nf4", _lora(spec, quantize="nf4")
    if lora.embedding == "none":
        yield "--adapter.embedding int8", _lora(spec, embedding="int8")
    if lora.dtype == "float32":
        yield "--adapter.dtype bfloat16", _lora(spec, dtype="bfloat16")
    if fit.max_length >= 2 * SHORTEST:
        half = fit.max_length // 2
        yield f"--fit.max_length {half}, --fit.micro_tokens {half}", _fit(spec, max_length=half, micro_tokens=half)
    if lora.rank >= 2 * LEAST_RANK:
        yield _ranked(spec, lora, lora.rank // 2)


def _larger(spec: PlanSpec, device: str) -> Iterator[tuple[str, PlanSpec]]:
    """What more memory buys: speed first, then rank."""
    fit, lora = spec.fit, spec.adapter
    if fit.checkpointing == "all" and not (fit.tile or fit.offload):
        yield "--fit.checkpointing off", _fit(spec, checkpointing="off")
    if fit.micro_tokens < fit.batch_tokens:
        micro = min(2 * fit.micro_tokens, fit.batch_tokens)
        yield f"--fit.micro_tokens {micro}", _fit(spec, micro_tokens=micro)
    if isinstance(lora, LoRASpec) and lora.rank < MOST_RANK:
        yield _ranked(spec, lora, min(2 * lora.rank, MOST_RANK))


def _ranked(spec: PlanSpec, lora: LoRASpec, rank: int) -> tuple[str, PlanSpec]:
    """Another rank at the same scale."""
    share = rank / lora.rank
    alpha = lora.alpha * (share**0.5 if lora.rslora else share)
    return f"--adapter.rank {rank}, --adapter.alpha {alpha:g}", _lora(spec, rank=rank, alpha=alpha)


def _fit(spec: PlanSpec, **changes: object) -> PlanSpec:
    return spec.model_copy(update={"fit": spec.fit.model_copy(update=changes)})


def _lora(spec: PlanSpec, **changes: object) -> PlanSpec:
    return spec.model_copy(update={"adapter": spec.adapter.model_copy(update=changes)})


def _counted(spec: PlanSpec, config: Config, device: str, room: int, few: int | None = None) -> tuple[Budget, int]:
    """A step, and how many layers are computed again in it; of the first few layers alone if so asked."""
    model = _model(spec, config)
    if few is not None:
        model.model.layers = model.model.layers[:few]
    if spec.fit.checkpointing == "auto" and few is None:
        held = step_budget(model, spec.fit, device=device, layers=0)
        free = room - (held.total - needed(held))
        layers = layers_to_recompute(model, spec.fit, free, device=device) if held.total > room else 0
    else:
        layers = 0 if spec.fit.checkpointing == "off" else len(model.model.layers)
    return step_budget(model, spec.fit, device=device, layers=layers), layers


def _estimated(spec: PlanSpec, config: Config, device: str, room: int) -> int:
    """The total by the line through few layers; "auto" counts as all."""
    count = config.num_hidden_layers
    if count <= 2 * FEW:
        return _counted(spec, config, device, room)[0].total
    low, high = (_counted(spec, config, device, room, few)[0].total for few in (FEW // 2, FEW))
    return high + (high - low) * (count - FEW) // (FEW - FEW // 2)


def _model(spec: PlanSpec, config: Config) -> Model:
    """The model of these settings, without numbers."""
    lora = spec.adapter
    model = build(config, dtype=getattr(torch, spec.fit.dtype) if isinstance(lora, LoRASpec) else torch.float32, device="meta")
    if not isinstance(lora, LoRASpec):
        return model
    for name, module in list(model.model.layers.named_modules()) if lora.quantize != "none" else ():
        if isinstance(module, Linear):
            model.model.layers.set_submodule(name, quantised(module.weight, lora.quantize))
    return adapted(hold_embedding(model) if lora.embedding == "int8" else model, lora, seed=0)


def _serving(spec: PlanSpec, config: Config, device: str) -> Plan:
    """A server with room for every request in full."""
    asked = spec.serving
    own = {name: getattr(asked, name) for name in ("dtype", "quantization", "kv_cache_dtype", "max_lora_rank")}
    settings = EngineSpec.parse({**own, "max_num_seqs": asked.requests})
    layout = Layout.of(config, settings.page_size, asked.context)
    pages = asked.requests * layout.most(asked.context, settings.max_num_batched_tokens)
    held = pages * layout.page_bytes(config, held_in(settings, dtype_of(config, settings)).itemsize)
    settings = settings.model_copy(update={"kv_cache_bytes": held, "max_model_len": min(asked.context, config.max_position_embeddings)})
    found, room = holding(config, with_adapters(settings, asked.max_loras), device), _room(spec, device)
    cache = found.items["keys and values"]
    left, each = room - found.total + cache, cache // (asked.requests * asked.context)
    context = left // (asked.requests * each)
    fewer = f"--serving.context {context}" if context >= 256 else f"--serving.requests {max(0, left // (asked.context * each))}"
    fits = found.total <= room
    suggestions = () if fits else (Suggestion((fewer,), room, left >= asked.context * each or context >= 256),)
    return Plan(found.total, tuple(Item(*pair) for pair in found.items.items()), room, fits, 0, None, suggestions)


def _config(name: str) -> Config:
    """Of a model that is here, or of a published size."""
    try:
        return named(name)
    except UserError:
        return config_of(locate(name).base)


def _device(spec: PlanSpec) -> str:
    return ("cuda" if torch.cuda.is_available() else "cpu") if spec.device == "auto" else spec.device


def _room(spec: PlanSpec, device: str) -> int:
    """The budget, or what is free here with this process counted in."""
    if spec.budget is not None:
        return size_in_bytes(spec.budget)
    if device == "cuda" and torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    if device == "cuda":
        raise UserError("there is no GPU here whose memory could be asked for", remedy="say how much there is: --budget 16GB")
    return int(psutil.virtual_memory().available + psutil.Process().memory_info().rss)


def _seconds(fit: FitSpec, flop: int) -> float:
    """Of a step's products at the rate of one large product here."""
    a, b = (torch.randn(1024, 1024, dtype=getattr(torch, fit.dtype), device="cuda" if torch.cuda.is_available() else "cpu") for _ in "ab")
    for _ in range(2):
        start = time.perf_counter()
        for _ in range(8):
            out = a @ b
        float(out[0, 0])
        seconds = time.perf_counter() - start
    return flop * -(-fit.batch_tokens // fit.micro_tokens) / (8 * 2 * 1024**3 / seconds)


def _show(found: Plan) -> None:
    for item in found.items:
        share = item.bytes / max(1, found.total_bytes)
        print(f"{item.name:<22} {size(item.bytes):>9}  {'#' * round(BAR * share)}")
    verdict = "fits" if found.fits else "does not fit"
    print(f"{'total':<22} {size(found.total_bytes):>9}  {verdict} in {size(found.room_bytes)}")
    if found.layers_computed_again:
        print(f"{found.layers_computed_again} layers keep their input alone and are computed again in the backward")
    if found.seconds_per_step is not None:
        print(f"at least {found.seconds_per_step:.3g} s a step: its products at this machine's rate")
    for suggestion in found.suggestions:
        verdict = "fits in" if suggestion.fits else "still does not fit,"
        print(f"{verdict} {size(suggestion.total_bytes)} with: {' '.join(suggestion.options)}")
