"""`garage sft`: a model and conversations -> an adapter, or the whole model tuned."""

import torch

from garage.core.errors import UserError
from garage.core.events import Listener
from garage.core.seeds import derive
from garage.data.encode import Encoding
from garage.models.adapters import adapt
from garage.models.families import build, config_of
from garage.models.layers import Model
from garage.models.weights import load_model, pick_device
from garage.recipes.rows import encode, split_of
from garage.recipes.runs import open_run
from garage.recipes.trained import Trained, summary, write_lora, write_model
from garage.specs.train import LoRASpec, SFTSpec
from garage.store.locate import Located, locate
from garage.tokens.voice import Voice
from garage.train.loop import fit


def sft(spec: SFTSpec, *listeners: Listener) -> Trained:
    """Fine-tune `spec.model` on `spec.data`; only what the assistant says is learned.

    Raises:
        UserError: a missing model or dataset, rows that must not be trained on, a loss that is not finite, a full disk.
        KeyboardInterrupt: after a checkpoint; `resume` goes on.
    """
    source = locate(spec.model)
    if source.adapter is not None:
        remedy = "merge it first (garage export ... --format merged) and tune that"
        raise UserError(f"{spec.model} is an adapter over {source.base}", remedy=remedy)
    with open_run("sft", spec, *listeners) as run:
        voice = Voice.load(source.base)
        chain, split = split_of(spec.data, spec.eval_share, derive(spec.fit.seed, "split"))
        how = Encoding(voice.tokenizer, voice.chat, spec.fit.max_length, thinking=spec.thinking, system=spec.system)
        train, held = encode(run, split, how, chain=chain, trained_with=source.template_hash)
        model = _model(spec, source)
        fitted = fit(model, train=train, held=held, spec=spec.fit, run=run.path, events=run.events)
        if isinstance(spec.adapter, LoRASpec):
            place = write_lora(run, model, voice, spec, spec.adapter, source)
        else:
            place = write_model(run, model, voice, spec, source=source)
        return summary(run, place, fitted)


def plan(spec: SFTSpec) -> dict[str, object]:
    """What would be trained: parameters of the model, and those of them that move."""
    source = locate(spec.model)
    model, lora = build(config_of(source.base), device="meta"), spec.adapter
    total = sum(weight.numel() for weight in model.parameters())
    if not isinstance(lora, LoRASpec):
        return {"parameters": total, "trained": total}
    targets = [weight for name, weight in model.named_parameters() if name.endswith(tuple(f"{target}.weight" for target in lora.targets))]
    moved = sum(lora.rank * sum(weight.shape) + lora.dora * weight.shape[0] for weight in targets)
    return {"parameters": total, "trained": moved, "adapted layers": len(targets)}


def _model(spec: SFTSpec, source: Located) -> Model:
    """The model, with what is to be trained marked as such: frozen weights in the run's precision, trained ones in float32."""
    device, lora = pick_device(spec.device), spec.adapter
    if not isinstance(lora, LoRASpec):
        return load_model(source.base, dtype=torch.float32, device=device)
    model = load_model(source.base, dtype=getattr(torch, spec.fit.dtype), device=device)
    seed = derive(spec.fit.seed, "adapter")
    return adapt(
        model, rank=lora.rank, alpha=lora.alpha, targets=lora.targets, dropout=lora.dropout, rslora=lora.rslora, dora=lora.dora, seed=seed
    )
