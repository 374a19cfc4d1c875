"""What training leaves behind: a model in the Hub's layout or an adapter in PEFT's, each with its tokenizer and chat template beside it."""

from dataclasses import dataclass
from pathlib import Path

import torch

from garage.core.artifact import read_manifest, writing
from garage.models.layers import Model
from garage.models.start import plain
from garage.models.targets import spelled_out
from garage.models.weights import save_model
from garage.recipes.run import Run
from garage.specs.train import LoRASpec, TrainSpec
from garage.store.adapter import AdapterConfig, write_adapter
from garage.store.fingerprint import FACT, base_hash
from garage.store.locate import Located
from garage.tokens.voice import Voice
from garage.train.loop import Fitted
from garage.train.parallel import rank


@dataclass(frozen=True)
class Truncated:
    """What did not fit into max_length."""

    rows: int
    tokens: int


@dataclass(frozen=True)
class Final:
    """Losses in nats per learned token; `held_loss` is that of the step whose weights were kept, if rows were held out."""

    loss: float
    held_loss: float | None
    step: int
    steps: int


@dataclass(frozen=True)
class Trained:
    """What a training verb returns."""

    run: Path
    checkpoint: Path
    final: Final
    tokens: int
    tokens_per_second: float
    peak_bytes: int
    seconds: float
    truncated: Truncated


def write_model(run: Run, model: Model, voice: Voice, spec: TrainSpec, *, source: Located | None = None) -> Path:
    """The whole model as an artifact of the run; `source` is what it was tuned from."""
    parents = (*((source.id,) if source else ()), read_manifest(run.path / "data").id)
    place = run.path / "artifacts" / "model"
    if rank():  # the first process has the whole of it
        return place
    with writing(place, kind="model", parents=parents, spec=spec.resolved()) as draft:
        save_model(model, draft.path, dtype=getattr(torch, spec.save_dtype))
        voice.save(draft.path)
        draft.facts.update(voice.facts)
    run.events.emit("artifact", path=str(place), kind_of="model")
    return place


def write_lora(run: Run, model: Model, voice: Voice, spec: TrainSpec, lora: LoRASpec, source: Located) -> Path:
    """The adapter as an artifact of the run; it names the base it belongs to, and in how few bits it was held.

    One that did not start from zero is written for the base as published (`models.start`), whatever bits were trained over.
    """
    place = run.path / "artifacts" / "adapter"
    if rank():
        return place
    base = str(source.base) if source.is_local else source.name
    config = AdapterConfig(
        base=base, rank=lora.rank, alpha=lora.alpha, targets=spelled_out(lora.targets), dropout=lora.dropout, is_rslora=lora.rslora,
        is_dora=lora.dora, rank_pattern=lora.rank_pattern, alpha_pattern=lora.alpha_pattern,
    )  # fmt: skip
    tensors, config = plain(model, config)
    bits = "" if lora.quantize == "none" or lora.start != "zero" else lora.quantize
    with writing(place, kind="adapter", parents=(source.id, read_manifest(run.path / "data").id), spec=spec.resolved()) as draft:
        write_adapter(draft.path, tensors, config)
        voice.save(draft.path)
        draft.facts.update(voice.facts, base=base, quantize=bits, **{FACT: base_hash(source.base)})
    run.events.emit("artifact", path=str(place), kind_of="adapter")
    return place


def summary(run: Run, place: Path, fitted: Fitted) -> Trained:
    """The result of a training verb."""
    ledger = fitted.ledger
    final = Final(fitted.loss, fitted.best_loss, fitted.restored_step, fitted.steps)
    truncated = Truncated(ledger.truncated_rows, ledger.truncated_tokens)
    return Trained(run.path, place, final, fitted.tokens, fitted.tokens_per_second, fitted.peak_bytes, fitted.seconds, truncated)
