"""Which linears an adapter goes on: presets, suffixes (`q_proj`, `3.mlp.up_proj`) or full names (`model.layers.3.mlp.up_proj`)."""

from collections.abc import Mapping, Sequence

from garage.core.errors import UserError
from garage.store.adapter import is_named

_ATTENTION, _MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
PRESETS: Mapping[str, tuple[str, ...]] = {
    "all-linear": _ATTENTION + _MLP, "attention": _ATTENTION, "mlp": _MLP, "qv": ("q_proj", "v_proj"),
}  # fmt: skip


def spelled_out(targets: Sequence[str]) -> tuple[str, ...]:
    """The targets with every preset replaced by its suffixes, each once."""
    return tuple(dict.fromkeys(part for target in targets for part in PRESETS.get(target, (target,))))


def chosen(linears: Sequence[str], targets: Sequence[str], *, of: str) -> list[str]:
    """The linears that the targets name; a UserError for a target that names none."""
    wanted = spelled_out(targets)
    for target in wanted:
        if not any(is_named(name, target) for name in linears):
            suffixes = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in linears))
            remedy = f"use {suffixes}, a full name, or a preset: {', '.join(PRESETS)}"
            raise UserError(f"adapter target {target!r} matches no linear layer of {of}", remedy=remedy)
    return [name for name in linears if any(is_named(name, target) for target in wanted)]


def refuse_strays(modules: Sequence[str], **patterns: Mapping[str, object]) -> None:
    """Refuse a key of a pattern that names no adapted module."""
    for pattern, keys in patterns.items():
        for key in keys:
            if not any(is_named(name, key) for name in modules):
                adapted = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in modules))
                raise UserError(f"{pattern}: {key!r} names no adapted module", remedy=f"adapted are {adapted}, or one by its full name")
