"""`garage adapters average`: one adapter of several, as an artifact that serves, evaluates and exports like a trained one."""

from dataclasses import dataclass
from pathlib import Path

from garage.core.artifact import writing
from garage.core.errors import UserError
from garage.core.events import EventLog, Listener
from garage.models.average import average as add_up
from garage.models.families import config_of
from garage.specs.adapters import AverageSpec
from garage.store.adapter import read_adapter, write_adapter
from garage.store.fingerprint import FACT, base_hash
from garage.store.locate import Located, locate
from garage.tokens.voice import Voice


@dataclass(frozen=True)
class Average:
    """What `garage adapters average` returns; `lost` is the largest share of a module's update that the rank cost."""

    path: Path
    rank: int
    lost: float


def average(spec: AverageSpec, *listeners: Listener) -> Average:
    """Write the weighted sum of `spec.adapters` to `spec.out`; prints one line.

    Raises:
        UserError: one is no adapter or a DoRA, or they differ in base, in the bits it was held in, or in chat template.
    """
    sources = [locate(name) for name in spec.adapters]
    adapters = [read_adapter(_adapter_of(source)) for source in sources]
    first, shares = sources[0], spec.weights or (1 / len(sources),) * len(sources)
    for other in sources[1:]:
        for what in ("base", "bits", "template_hash"):
            ours, theirs = getattr(first, what), getattr(other, what)
            if ours != theirs:
                said = f"{first.name} and {other.name} differ in {what}: {str(ours) or 'none'} and {str(theirs) or 'none'}"
                raise UserError(said, remedy="average adapters that were trained alike")
    made = add_up(adapters, shares, config_of(first.base), rank=spec.rank)
    with writing(spec.out, kind="adapter", parents=[source.id for source in sources], spec=spec.resolved()) as draft:
        write_adapter(draft.path, made.tensors, made.config)
        voice = Voice.load(first.newest if (first.newest / "tokenizer.json").exists() else first.base)
        voice.save(draft.path)
        draft.facts.update(voice.facts, base=made.config.base, quantize=first.bits, **{FACT: base_hash(first.base)})
    rank = max(made.config.rank, *made.config.rank_pattern.values(), 0)
    EventLog(None, *listeners).emit("artifact", path=str(spec.out), kind_of="adapter", detail=f"rank {rank}")
    print(f"rank {rank}, at most {made.lost:.1%} of a module's update lost to it")
    return Average(spec.out, rank, made.lost)


def _adapter_of(source: Located) -> Path:
    if source.adapter is None:
        raise UserError(f"{source.name} is a whole model, not an adapter", remedy="give runs or directories of adapters")
    return source.adapter
