"""An adapter on disk in the layout of PEFT: adapter_config.json and adapter_model.safetensors.

Foreign files are read with unknown keys tolerated; a key that changes the arithmetic in a way we do not honour is refused by name.
`target_modules` may be a list of suffixes, of full names, a pattern or "all-linear": what is adapted is read from the tensors, so
its spelling does not matter. Written files use suffixes, which every version of PEFT reads.

Limits: LoRA, rsLoRA and DoRA on linear layers without biases; no modules saved whole; safetensors only.
Source: PEFT 0.21, whose newest extra keys are all null for these kinds.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from garage.core.errors import UserError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_HONOURED: Mapping[str, object] = {
    "peft_type": "LORA", "bias": "none", "fan_in_fan_out": False, "modules_to_save": None, "lora_bias": False, "layer_replication": None,
    "alora_invocation_tokens": None, "trainable_token_indices": None, "target_parameters": None, "use_qalora": False, "use_bdlora": None,
    "arrow_config": None, "velora_config": None, "monteclora_config": None, "kasa_config": None,
}  # fmt: skip
_KEEPS_BASE = (True, False, "gaussian", "eva", "orthogonal")  # ways to start that leave W alone; PiSSA, OLoRA and the like change it
T = TypeVar("T")
_REMEDY = "train or export the adapter as plain LoRA, rsLoRA or DoRA with PEFT or garage"


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What adapter_config.json says. `rank_pattern` and `alpha_pattern` override `rank` and `alpha` for modules by name or suffix."""

    base: str
    rank: int
    alpha: float
    targets: tuple[str, ...]
    dropout: float = 0.0
    is_rslora: bool = False
    is_dora: bool = False
    revision: str | None = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def rank_of(self, module: str) -> int:
        """The rank of a module by its full name."""
        return value_of(self.rank_pattern, module, self.rank)

    def alpha_of(self, module: str) -> float:
        """The strength of a module by its full name."""
        return value_of(self.alpha_pattern, module, self.alpha)

    def scale_of(self, module: str) -> float:
        """What B A is multiplied by there."""
        rank = self.rank_of(module)
        return self.alpha_of(module) / (rank**0.5 if self.is_rslora else rank)


def write_adapter(directory: Path, tensors: Mapping[str, Tensor], config: AdapterConfig) -> None:
    """Write both files into `directory`; `tensors` carry PEFT's names."""
    raw = {
        "alpha_pattern": dict(config.alpha_pattern), "base_model_name_or_path": config.base, "bias": "none", "fan_in_fan_out": False,
        "inference_mode": True, "init_lora_weights": True, "lora_alpha": config.alpha, "lora_dropout": config.dropout,
        "modules_to_save": None, "peft_type": "LORA", "peft_version": "0.21.2", "r": config.rank, "rank_pattern": dict(config.rank_pattern),
        "revision": config.revision, "target_modules": list(config.targets), "task_type": "CAUSAL_LM",
        "use_dora": config.is_dora, "use_rslora": config.is_rslora,
    }  # fmt: skip
    (directory / CONFIG).write_text(json.dumps(raw, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, directory / WEIGHTS, {"format": "pt"})


def read_adapter(directory: Path) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """The configuration and the tensors of an adapter.

    Raises:
        UserError: a file is missing or damaged, weights are pickled, numbers are not finite, or a key asks for what we do not honour.
    """
    config = _read_config(directory / CONFIG)
    path = directory / WEIGHTS
    if not path.exists() and (directory / "adapter_model.bin").exists():
        raise UserError(f"{directory} holds weights as pickle, which can run code when read", remedy="save it again with safetensors")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}", remedy="copy the adapter again") from error
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{path}: tensor {name} holds NaN, infinity or no floats", remedy="copy the adapter again, or train it again")
    return config, tensors


def _read_config(path: Path) -> AdapterConfig:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        for key, honoured in _HONOURED.items():
            if raw.get(key) not in (None, honoured, [], {}):
                raise UserError(f"{path}: {key} is {raw[key]!r}, which is not supported", remedy=_REMEDY)
        if raw.get("init_lora_weights", True) not in _KEEPS_BASE:
            raise UserError(f"{path}: init_lora_weights is {raw['init_lora_weights']!r}, which changes the base model", remedy=_REMEDY)
        targets = raw.get("target_modules") or ()
        config = AdapterConfig(
            base=str(raw.get("base_model_name_or_path") or ""), rank=int(raw["r"]), alpha=float(raw["lora_alpha"]),
            targets=(targets,) if isinstance(targets, str) else tuple(sorted(targets)), dropout=float(raw.get("lora_dropout") or 0.0),
            is_rslora=bool(raw.get("use_rslora")), is_dora=bool(raw.get("use_dora")), revision=raw.get("revision"),
            rank_pattern=dict(raw.get("rank_pattern") or {}), alpha_pattern=dict(raw.get("alpha_pattern") or {}),
        )  # fmt: skip
    except FileNotFoundError as error:
        raise UserError(f"{path.parent} is not an adapter: it has no {CONFIG}", remedy="give the directory of a PEFT adapter") from error
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise UserError(f"{path} is damaged: {error!r}", remedy="copy the adapter again") from error
    for key in (*config.rank_pattern, *config.alpha_pattern):
        if not key.replace(".", "").replace("_", "").isalnum():
            raise UserError(f"{path}: {key!r} in rank_pattern or alpha_pattern is a pattern", remedy="write the module names out")
    if config.rank < 1 or not 0 <= config.dropout < 1:
        raise UserError(f"{path}: r is {config.rank} and lora_dropout {config.dropout}", remedy="copy the adapter again")
    return config


def value_of(pattern: Mapping[str, T], module: str, usual: T) -> T:
    """What a pattern gives a module by its full name: the value of the first key that names it."""
    return next((value for key, value in pattern.items() if is_named(module, key)), usual)


def is_named(module: str, key: str) -> bool:
    """Whether `key` is a module's full name or its end."""
    return module == key or module.endswith(f".{key}")
