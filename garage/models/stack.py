"""Several adapters over one base: attached once, switched without touching a weight, or added up with declared weights.

`use(model, "a")` is exactly what `attach` alone would give, `use(model, None)` exactly the base, `use(model, {"a": 0.7, "b": 0.3})` is
W x + sum of w (W_a - W) x, whatever kind each adapter is of; an adapter with weight 0 is not computed. No weight of the base changes.

Limits: for answering, not for training or merging: merge or save a model that one adapter was attached to. The weights are those of the
whole model, not of a row of a batch.
Shape suffixes: T packed tokens, I inputs, O outputs.
"""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from garage.core.errors import UserError
from garage.models.adapters import DoRA, LoRA, adapters_of, attach
from garage.models.layers import Linear, Model


class Stack(nn.Module):
    """A frozen linear and its adapters by name; `weights` says which count, and how much."""

    def __init__(self, base: Linear) -> None:
        super().__init__()
        self.base, self.held = base, nn.ModuleList()
        self.loras: dict[str, LoRA] = {}
        self.weights: Mapping[str, float] = {}

    def add(self, name: str, lora: LoRA) -> None:
        """One more adapter of the same base."""
        self.held.append(lora)
        self.loras[name] = lora

    def forward(self, x_TI: Tensor) -> Tensor:
        active = [(self.loras[name], weight) for name, weight in self.weights.items() if name in self.loras and weight]
        if len(active) == 1 and active[0][1] == 1:
            return active[0][0](x_TI)  # type: ignore[no-any-return]
        y_TO = base_TO = self.base(x_TI)
        for lora, weight in active:
            y_TO = y_TO + weight * _change(lora, x_TI, base_TO)
        return y_TO  # type: ignore[no-any-return]


def stack(model: Model, adapters: Mapping[str, Path]) -> Model:
    """Attach PEFT adapters to a model under names; none counts until `use` says so.

    Raises:
        UserError: a name is taken, or an adapter does not fit; the model is then as it was.
    """
    known = names(model)
    for name, directory in adapters.items():
        if name in known:
            raise UserError(f"there is an adapter {name!r} on this model already", remedy="give each a name of its own")
        _add(model, name, directory)
    return model.eval()


def use(model: Model, which: str | Mapping[str, float] | None) -> Model:
    """Let one adapter count, several with their weights, or none."""
    weights = {} if which is None else {which: 1.0} if isinstance(which, str) else dict(which)
    known = names(model)
    for name in weights:
        if name not in known:
            raise UserError(f"there is no adapter {name!r} on this model", remedy=f"use {', '.join(known) or 'stack first'}")
    for _, place in _stacks(model):
        place.weights = weights
    return model


def names(model: Model) -> list[str]:
    """The adapters that are attached."""
    return sorted({name for _, place in _stacks(model) for name in place.loras})


def _add(model: Model, name: str, directory: Path) -> None:
    """Attach to the bare bases, then put every adapter into the stack of its place."""
    places = dict(_stacks(model))
    for at, place in places.items():
        model.set_submodule(at, place.base)
    made: list[tuple[str, LoRA]] = []
    try:
        attach(model, directory)
        made = list(adapters_of(model))
    finally:
        for at, lora in list(adapters_of(model)):
            model.set_submodule(at, lora.base)
        for at, lora in made:
            places.setdefault(at, Stack(lora.base)).add(name, lora)
        for at, place in places.items():
            model.set_submodule(at, place)


def _change(lora: LoRA, x_TI: Tensor, base_TO: Tensor) -> Tensor:
    """What an adapter adds to the base's output."""
    if isinstance(lora, DoRA):
        return lora(x_TI) - base_TO  # type: ignore[no-any-return]
    return (x_TI @ lora.lora_A.to(x_TI.dtype).T) @ lora.lora_B.to(x_TI.dtype).T * lora.scale


def _stacks(model: Model) -> list[tuple[str, Stack]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, Stack)]
