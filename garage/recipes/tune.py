"""What `sft` and `dpo` share: a model, rows as tokens, the loop, and an adapter or a whole model at the end."""

from collections.abc import Callable, Sequence

import torch

from garage.core.errors import UserError
from garage.core.events import Listener
from garage.core.seeds import derive
from garage.data.encode import Encoding
from garage.models.adapters import Kind, adapt, adapters_of
from garage.models.families import build, config_of
from garage.models.layers import Model
from garage.models.quantize import QuantLinear, hold_embedding
from garage.models.start import begin
from garage.models.weights import load_model, pick_device
from garage.recipes.afford import fit_within_memory
from garage.recipes.rows import encode, split_of
from garage.recipes.run import Run, open_run
from garage.recipes.trained import Trained, summary, write_lora, write_model
from garage.specs.train import LoRASpec, TuneSpec
from garage.store.dataset import Encoded
from garage.store.locate import Located, locate
from garage.tokens.voice import Voice
from garage.train.loop import Fitted, fit
from garage.train.objectives.likelihood import Objective

Aim = Callable[[Run, Model, Encoded, Encoded | None], Objective | None]


def tune(verb: str, spec: TuneSpec, listeners: Sequence[Listener], aim: Aim, *, pairs: bool = False) -> Trained:
    """Tune `spec.model` on `spec.data`; `aim` makes the objective once the model is there, before it moves (None: likelihood)."""
    source = locate(spec.model)
    if source.adapter is not None:
        remedy = "merge it first (garage export ... --format merged) and tune that"
        raise UserError(f"{spec.model} is an adapter over {source.base}", remedy=remedy)
    if spec.resume is not None and type(spec).read(spec.resume / "spec.json").adapter != spec.adapter:
        remedy = "leave out the --adapter options, or choose another --out"
        raise UserError("a run goes on with the adapter it was started with", remedy=remedy)
    with open_run(verb, spec, *listeners) as run:
        voice = Voice.load(source.base)
        chain, split = split_of(spec.data, spec.eval_share, derive(spec.fit.seed, "split"))
        how = Encoding(voice.tokenizer, voice.chat, spec.fit.max_length, thinking=spec.thinking, system=spec.system, pairs=pairs)
        train, held = encode(run, split, how, chain=chain, trained_with=source.template_hash, allowed=spec.allow)
        model = _model(run, spec, source)
        objective = aim(run, model, train, held)

        def fitting(spec: TuneSpec) -> Fitted:
            return fit(model, train=train, held=held, spec=spec.fit, run=run.path, events=run.events, objective=objective)

        fitted, spec = fit_within_memory(run, model, train, spec, fitting, keeps_length=pairs)
        if isinstance(spec.adapter, LoRASpec):
            place = write_lora(run, model, voice, spec, spec.adapter, source)
        else:
            place = write_model(run, model, voice, spec, source=source)
        return summary(run, place, fitted)


def plan(spec: TuneSpec) -> dict[str, object]:
    """What would be trained: parameters of the model, those of them that move, and how strongly adapters act."""
    model = build(config_of(locate(spec.model).base), device="meta")
    total = sum(weight.numel() for weight in model.parameters())
    if not isinstance(spec.adapter, LoRASpec):
        return {"parameters": total, "trained": total}
    _adapted(model, spec.adapter, seed=0)
    moved = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    loras = [lora for _, lora in adapters_of(model)]
    scales = ", ".join(f"{scale:g}" for scale in sorted({lora.scale for lora in loras}))
    made = {"parameters": total, "trained": moved, "adapted layers": len(loras), "effective scale": scales}
    warning = strength(spec.adapter)
    return made | ({"warning": " ".join(warning)} if warning else {})


def strength(lora: LoRASpec) -> tuple[str, str] | None:
    """What to say, and what to do, where rsLoRA makes the same alpha act more than twice as strongly."""
    root, equal = lora.rank**0.5, lora.alpha / lora.rank**0.5
    if not lora.rslora or root <= 2:
        return None
    said = f"rslora scales by alpha / sqrt(rank) = {equal:.4g}, {root:.3g} times as much as alpha / rank = {lora.alpha / lora.rank:.4g};"
    return said, f"for equal strength: --adapter.alpha {equal:.4g} (alpha / sqrt(rank))"


def _model(run: Run, spec: TuneSpec, source: Located) -> Model:
    """The model, with what is to be trained marked as such: frozen weights in the run's precision, trained ones in float32."""
    device, lora = pick_device(spec.device), spec.adapter
    if not isinstance(lora, LoRASpec):
        model = load_model(source.base, dtype=torch.float32, device=device)
        if any(isinstance(module, QuantLinear) for module in model.modules()):
            remedy = "train an adapter (--adapter.kind lora), or take the unquantised checkpoint"
            raise UserError(f"{spec.model} holds its matrices in few bits, which cannot be trained", remedy=remedy)
        return model
    if warning := strength(lora):
        run.events.emit("warning", message=warning[0], remedy=warning[1])
    bits = "" if lora.quantize == "none" else lora.quantize
    seed = derive(spec.fit.seed, "adapter")
    model = load_model(source.base, dtype=getattr(torch, spec.fit.dtype), device=device, quantize=bits)
    if lora.embedding == "int8":
        hold_embedding(model)
    _adapted(model, lora, seed=seed)
    if lora.start != "zero":
        left = begin(model, source.base, start=lora.start, bits=bits, iterations=lora.loftq_iterations, seed=seed)
        note = f"; the adapter will be written for the base as published, which differs by {left:.1%} of a matrix" if bits else ""
        run.events.emit("stage", name=f"adapters start by {lora.start}{note}")
    return model


def _adapted(model: Model, lora: LoRASpec, *, seed: int) -> Model:
    kind = Kind(dropout=lora.dropout, rslora=lora.rslora, dora=lora.dora, dtype=getattr(torch, lora.dtype))
    return adapt(
        model, rank=lora.rank, alpha=lora.alpha, targets=lora.targets, rank_pattern=lora.rank_pattern, alpha_pattern=lora.alpha_pattern,
        seed=seed, **kind,
    )  # fmt: skip
