"""When memory runs out in a run: give up what changes the result too, one thing at a time, and go on from the weights there are.

The loop has then given up all that changes nothing (`train.ladder`) and saved a checkpoint. Here a row's length is halved, then the
rank, then the magnitudes go, then all targets but q and v, as far as `fit.on_oom` names them, each once. Adapters that did not start
from zero keep their rank and targets; with patterns all ranks are kept. The run's `spec.json` says what it came to, so that `--resume` and
the artifact agree with it.

Limits: a run measured in epochs counts the steps before and after its rows were shortened alike; in several processes a run stops instead.
"""

import json
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import TypeVar

from garage.core.artifact import write_file
from garage.models.layers import Model
from garage.models.shrink import shrink
from garage.models.targets import spelled_out
from garage.recipes.run import Run
from garage.specs.train import FitSpec, LoRASpec, PretrainSpec, Rung, TuneSpec
from garage.store.dataset import Encoded
from garage.train.batches import read_batches
from garage.train.budget import step_budget
from garage.train.ladder import OutOfMemory
from garage.train.loop import Fitted, prepare
from garage.train.memory import release
from garage.train.parallel import size
from garage.train.resume import carry_over

SHORTEST, LOWEST = 256, 4
S = TypeVar("S", TuneSpec, PretrainSpec)


def fit_within_memory(
    run: Run, model: Model, train: Encoded, spec: S, fit: Callable[[FitSpec], Fitted], *, keeps_length: bool = False
) -> tuple[Fitted, S]:
    """What `fit` comes to, and the settings it came to it with; `keeps_length` where a reference was computed on rows as long as they are.

    Raises:
        OutOfMemory: nothing is left to give up.
    """
    used: set[Rung] = {"length"} if keeps_length else set()
    while True:
        try:
            return fit(spec.fit), spec
        except OutOfMemory as error:
            if size() > 1:
                raise
            trouble = error.with_traceback(None)  # its frames hold tensors
        rung, cheaper = _next(spec, used, trouble)
        used.add(rung)
        _give_up(run, model, train, (spec, cheaper), rung, trouble)
        spec = cheaper


def _next(spec: S, used: Collection[Rung], trouble: OutOfMemory) -> tuple[Rung, S]:
    for rung in spec.fit.on_oom:
        if rung not in used and (cheaper := _cheaper(spec, rung)) is not None:
            lean = trouble.lean.settings(cheaper.fit)
            fit = lean.model_copy(update={"micro_tokens": max(lean.max_length, lean.micro_tokens // 2)})
            return rung, cheaper.model_copy(update={"fit": fit})
    raise trouble


def _cheaper(spec: S, rung: Rung) -> S | None:
    fit, lora = spec.fit, spec.adapter
    if rung == "length" and fit.max_length >= 2 * SHORTEST:
        return spec.model_copy(update={"fit": fit.model_copy(update={"max_length": fit.max_length // 2})})
    if not isinstance(lora, LoRASpec) or lora.start != "zero":
        return None  # a base that gave something up to its adapter depends on its rank and targets
    kept = tuple(target for target in spelled_out(lora.targets) if _is_qv(target))
    change: dict[str, object] = {}
    if rung == "rank" and lora.rank >= 2 * LOWEST and not (lora.rank_pattern or lora.alpha_pattern):
        change = {"rank": lora.rank // 2, "alpha": lora.alpha / (2**0.5 if lora.rslora else 2)}  # the scale stays
    elif rung == "dora" and lora.dora:
        change = {"dora": False}
    elif rung == "targets" and kept and kept != spelled_out(lora.targets):
        patterns = {name: {k: v for k, v in getattr(lora, name).items() if _is_qv(k)} for name in ("rank_pattern", "alpha_pattern")}
        change = {"targets": kept, **patterns}
    return spec.model_copy(update={"adapter": lora.model_copy(update=change)}) if change else None


def _is_qv(name: str) -> bool:
    return name.rpartition(".")[2] in ("q_proj", "v_proj")


def _give_up(run: Run, model: Model, train: Encoded, specs: tuple[S, S], rung: Rung, trouble: OutOfMemory) -> None:
    """Change the model, the run's settings and its checkpoint together, and say what that saves."""
    device, fit = next(model.parameters()).device, specs[1].fit
    steps_per_epoch = read_batches(train, fit, device, batch_tokens=fit.batch_tokens).steps_per_epoch
    before = step_budget(model, trouble.lean.settings(specs[0].fit), device=device.type, layers=trouble.lean.layers).tensors
    lora = specs[1].adapter
    if isinstance(lora, LoRASpec):
        shrink(model, rank=max(lora.rank, *lora.rank_pattern.values(), 0), dora=lora.dora, targets=lora.targets)
    release(device)
    write_file(run.path / "spec.json", json.dumps(specs[1].resolved() | {"resume": None}, indent=1, ensure_ascii=False) + "\n")
    trained = prepare(model, fit)
    cursor = replace(trouble.progress.cursor, step=int(trouble.share * steps_per_epoch))
    progress = replace(trouble.progress, best_loss=None, best_step=None, stale=0, cursor=cursor)
    carry_over(run.path, fit, progress, trained, has_new=rung != "length")
    saved = before - step_budget(model, fit, device=device.type, layers=trouble.lean.layers).tensors
    message = f"{trouble.args[0].partition(', and')[0]}; the run goes on with {_words(specs[1], rung)}: {saved:,} bytes less"
    run.events.emit("warning", alarm="oom", rung=rung, message=message, saved=saved, remedy="a smaller model, or more memory, keeps it")


def _words(spec: TuneSpec | PretrainSpec, rung: Rung) -> str:
    lora = spec.adapter
    assert rung == "length" or isinstance(lora, LoRASpec), rung
    said = {"length": f"rows of at most {spec.fit.max_length} tokens"}
    if isinstance(lora, LoRASpec):
        said |= {"rank": f"rank {lora.rank}", "dora": "no magnitudes", "targets": f"adapters on {', '.join(lora.targets)} alone"}
    return said[rung]
