"""`garage sft`: a model and conversations -> an adapter, or the whole model tuned; or several adapters over one base.

Several adapters are trained in turn, each as a run of its own in RUN/adapters/NAME: to the last bit what a run with its rows alone would
be. The base is loaded once, and every adapter is taken off it before the next is put on. A resumed run finds the finished ones and goes on
with the one that was interrupted.
"""

from collections.abc import Sequence

from garage.core.events import Listener
from garage.data.read import read_dataset
from garage.models.adapters import strip
from garage.models.layers import Model
from garage.recipes.run import Run, open_run
from garage.recipes.trained import Trained
from garage.recipes.tune import load_base, tune, whole_model
from garage.recipes.tune import plan as plan_tuning
from garage.specs.train import SFTSpec
from garage.store.dataset import Encoded


def sft(spec: SFTSpec, *listeners: Listener) -> Trained | dict[str, Trained]:
    """Fine-tune `spec.model` on `spec.data`; only what the assistant says is learned. With `spec.adapters` the result is one for each.

    Raises:
        UserError: a missing model or dataset, rows that must not be trained on, a loss that is not finite or stays high, a full disk.
        KeyboardInterrupt: after a checkpoint; `resume` goes on.
    """
    if not spec.adapters:
        return tune("sft", spec, listeners, _likelihood)
    source = whole_model(spec.model)
    for path in (path for data in spec.adapters.values() for path in data):
        read_dataset(path)  # what is missing is told before the first hour, not after
    with open_run("sft", spec, *listeners) as run:
        base = load_base(spec, source)
        return {name: _next(run, base, name, spec, listeners) for name in spec.adapters}


def plan(spec: SFTSpec) -> dict[str, object]:
    """What would be trained, and how long."""
    if not spec.adapters:
        return plan_tuning(spec)
    return {f"adapter {name}": plan_tuning(_alone(spec, name)) for name in spec.adapters}


def _next(run: Run, base: Model, name: str, spec: SFTSpec, listeners: Sequence[Listener]) -> Trained:
    names = list(spec.adapters)
    run.events.emit("stage", name=f"adapter {names.index(name) + 1} of {len(names)}: {name}")
    trained = tune("sft", _alone(spec, name), listeners, _likelihood, base=base)
    strip(base)
    return trained


def _alone(spec: SFTSpec, name: str) -> SFTSpec:
    """The run of one adapter."""
    place = spec.out / "adapters" / name
    going_on = place if (place / "spec.json").exists() else None
    return spec.model_copy(update={"data": spec.adapters[name], "adapters": {}, "out": place, "resume": going_on})


def _likelihood(run: Run, model: Model, train: Encoded, held: Encoded | None) -> None:
    return None
