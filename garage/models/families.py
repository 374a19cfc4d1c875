"""Which families there are: their configurations by file and by name, and building them.

Adding a family is one file beside `qwen3.py` and one entry in `FAMILIES`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from garage.core.errors import UserError
from garage.core.files import read_object
from garage.core.seeds import derive
from garage.models import gemma3, qwen3
from garage.models.config import Config, Rope, token_ids
from garage.models.layers import Model


@dataclass(frozen=True)
class Family:
    """`read` and `write` translate config.json; tensors under `skipped` belong to other modalities; `prefixes` are renamed."""

    model: Callable[[Any], Model]
    config: type[Config]
    read: Callable[[Mapping[str, object]], Config]
    write: Callable[[Any], dict[str, object]]
    sizes: Mapping[str, Config]
    prefixes: tuple[tuple[str, str], ...] = ()
    skipped: tuple[str, ...] = ()

    def renamed(self, name: str) -> str:
        """A tensor's name in files of any origin, under our prefix."""
        for theirs, ours in self.prefixes:
            if name.startswith(theirs):
                return ours + name.removeprefix(theirs)
        return name


_GEMMA3 = Family(
    gemma3.Gemma3, gemma3.Gemma3Config, gemma3.read, gemma3.write, gemma3.SIZES,
    prefixes=(("language_model.model.", "model."), ("model.language_model.", "model."), ("language_model.lm_head.", "lm_head.")),
    skipped=("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector."),
)  # fmt: skip
_QWEN3 = Family(qwen3.Qwen3, qwen3.Qwen3Config, qwen3.read, qwen3.write, qwen3.SIZES)
FAMILIES = {"qwen3": _QWEN3, "gemma3_text": _GEMMA3, "gemma3": _GEMMA3}


def config_of(directory: Path) -> Config:
    """The configuration of a Hub directory; end-of-turn ids are the union of config.json and generation_config.json."""
    config = read_config(_load_json(directory / "config.json"))
    if not (directory / "generation_config.json").exists():
        return config
    more = token_ids(_load_json(directory / "generation_config.json").get("eos_token_id"), "eos_token_id")
    return replace(config, eos_token_id=tuple(dict.fromkeys((*config.eos_token_id, *more))))


def read_config(raw: Mapping[str, object]) -> Config:
    """The configuration that the keys of a config.json describe.

    Raises:
        UserError: an unknown family, or a key that asks for what we do not honour; the key is named.
    """
    kind = raw.get("model_type")
    if kind not in FAMILIES:
        raise UserError(f"config.json: model_type is {kind!r}", remedy=f"use a model whose model_type is one of {', '.join(FAMILIES)}")
    return FAMILIES[str(kind)].read(raw)


def named(name: str) -> Config:
    """A published size by name, such as "qwen3-0.6b" or "gemma3-270m"."""
    sizes: dict[str, Config] = {**_QWEN3.sizes, **_GEMMA3.sizes}
    if name not in sizes:
        raise UserError(f"there is no model size {name!r}", remedy=f"use one of {', '.join(sizes)}")
    return sizes[name]


def from_architecture(family: str, *, vocab_size: int, rope_theta: float, sliding_window: int | None, **shape: Any) -> Config:
    """The configuration of a new model. `shape` holds the other fields of `Config`; a sliding window is gemma3's alone."""
    if family == "qwen3":
        assert sliding_window is None, sliding_window
        return qwen3.Qwen3Config(vocab_size=vocab_size, rope=Rope(theta=rope_theta), **shape)
    assert family == "gemma3" and sliding_window is not None, (family, sliding_window)
    layers = {"layer_types": gemma3.pattern(shape["num_hidden_layers"]), "query_pre_attn_scalar": shape["head_dim"], **shape}
    return gemma3.Gemma3Config(vocab_size=vocab_size, rope=Rope(theta=rope_theta), sliding_window=sliding_window, **layers)


def config_json(config: Config) -> dict[str, object]:
    """The config.json that transformers 5 writes for this model, keys sorted."""
    return dict(sorted(family_of(config).write(config).items()))


def family_of(config: Config) -> Family:
    """The family a configuration belongs to."""
    return next(family for family in FAMILIES.values() if isinstance(config, family.config))


def build(config: Config, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Model:
    """The model with memory for its weights and nothing in them; "meta" needs no memory."""
    with torch.device("meta"):
        model = family_of(config).model(config)
    for name, parameter in list(model.named_parameters()):
        place(model, name, torch.empty(parameter.shape, dtype=dtype, device=device))
    model.tie()
    return model


def place(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Make `tensor` the parameter called `name`."""
    module, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(module), leaf, nn.Parameter(tensor))


@torch.no_grad()
def init_weights(model: Model, seed: int) -> None:
    """Draw new weights: norms are the identity, matrices normal with deviation 0.02, smaller by sqrt(2 L) where they write to the
    residual stream (Radford et al. 2019). Each draw depends on the seed and the tensor's name alone, not on device or dtype."""
    residual = (2 * model.config.num_hidden_layers) ** -0.5
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.fill_(1.0 - _offset(model, name))
            continue
        draw = torch.Generator().manual_seed(derive(seed, "init", name))
        deviation = 0.02 * (residual if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0)
        parameter.copy_(torch.empty(parameter.shape).normal_(0.0, deviation, generator=draw))


def _offset(model: Model, name: str) -> float:
    offset = model.get_submodule(name.removesuffix(".weight")).offset
    assert isinstance(offset, float), offset
    return offset


def _load_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise UserError(f"{path.parent} has no {path.name}", remedy="give the directory of a model in Hub layout")
    return read_object(path)
