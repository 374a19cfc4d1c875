"""What the families' configurations share, and reading it from the keys of `config.json` in any of their vintages.

A file from the Hub is foreign: unknown keys are tolerated, but a key that changes the arithmetic in a way we do not honour is
refused by name. Sources: the published files and what transformers 5.23 reads and writes.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from garage.core.errors import UserError

Raw = Mapping[str, object]
_SHAPE = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
          "max_position_embeddings")  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary positions of one kind of layer. `original` is the context length before YaRN (arXiv 2309.00071) stretched it."""

    theta: float
    kind: Literal["default", "linear", "yarn"] = "default"
    factor: float = 1.0
    original: int = 0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Config(ABC):
    """The fields every family has, under the names of `config.json`. `dtype` is what the file says its weights are."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None
    dtype: str | None = None

    @abstractmethod
    def window(self, layer: int) -> int | None:
        """How many tokens a query of this layer sees, itself included; None is all of them."""


def shared_fields(raw: Raw, defaults: Mapping[str, object]) -> dict[str, object]:
    """The fields of `Config` from `raw`, `defaults` standing in for absent ones; checked for sense."""
    refuse_unless(raw, "attention_bias", False)
    refuse_unless(raw, "attention_dropout", 0.0)
    if raw.get("quantization_config"):
        refuse_method(raw["quantization_config"])
    raw = {**defaults, **raw}
    fields: dict[str, object] = {key: whole(raw, key) for key in _SHAPE}
    if whole(raw, "num_attention_heads") % whole(raw, "num_key_value_heads"):
        raise refused("num_key_value_heads", raw["num_key_value_heads"], "num_attention_heads must be a multiple of it")
    if whole(raw, "head_dim") % 2:
        raise refused("head_dim", raw["head_dim"], "rotary positions need pairs")
    fields |= {"rms_norm_eps": number(raw, "rms_norm_eps"), "tie_word_embeddings": bool(raw["tie_word_embeddings"])}
    fields |= {key: next(iter(token_ids(raw.get(key), key)), None) for key in ("bos_token_id", "pad_token_id")}
    dtype = raw.get("dtype") or raw.get("torch_dtype")
    fields["dtype"] = str(dtype).removeprefix("torch.") if dtype else None
    return fields | {"eos_token_id": token_ids(raw.get("eos_token_id"), "eos_token_id")}


def read_rope(raw: Raw, *, theta: float, positions: int) -> Rope:
    """One kind of layer's rotary positions; `theta` and `positions` (the context length) stand in for absent keys."""
    kind = raw.get("rope_type") or raw.get("type") or "default"
    if raw.get("type") not in (None, kind):
        raise refused("rope_type", kind, f"but the older key type is {raw['type']!r}")
    base = number({"rope_theta": theta, **raw}, "rope_theta")
    if kind == "default":
        return Rope(theta=base)
    if kind == "linear":
        return Rope(theta=base, kind="linear", factor=number(raw, "factor"))
    if kind != "yarn":
        raise refused("rope_type", kind, "known are default, linear and yarn")
    for key in ("mscale", "mscale_all_dim"):
        refuse_unless(raw, key, None)
    refuse_unless(raw, "truncate", True)
    raw = {"original_max_position_embeddings": positions, **{k: v for k, v in raw.items() if v is not None}}
    given = {key: number(raw, key) for key in ("attention_factor", "beta_fast", "beta_slow") if key in raw}
    return Rope(theta=base, kind="yarn", factor=number(raw, "factor"), original=whole(raw, "original_max_position_embeddings"), **given)


def rope_json(rope: Rope) -> dict[str, object]:
    """`rope` under the names transformers 5 writes."""
    out: dict[str, object] = {"rope_theta": rope.theta, "rope_type": rope.kind}
    if rope.kind != "default":
        out["factor"] = rope.factor
    if rope.kind == "yarn":
        extra = {"attention_factor": (rope.attention_factor, None), "beta_fast": (rope.beta_fast, 32.0), "beta_slow": (rope.beta_slow, 1.0)}
        out |= {"original_max_position_embeddings": rope.original} | {key: value for key, (value, usual) in extra.items() if value != usual}
    return out


def layer_types(raw: Raw, count: int) -> tuple[str, ...] | None:
    """The checked `layer_types` of the file, or None if it has none."""
    listed = raw.get("layer_types")
    if listed is None:
        return None
    if not isinstance(listed, list) or len(listed) != count:
        raise refused("layer_types", listed, f"there are {count} layers")
    for kind in listed:
        if kind not in ("full_attention", "sliding_attention"):
            raise refused("layer_types", kind, "known are full_attention and sliding_attention")
    return tuple(listed)


def base_json(config: Config, *, model_type: str, architecture: str) -> dict[str, object]:
    """What transformers 5 writes for every family, under its names."""
    eos = config.eos_token_id
    as_is = (*_SHAPE, "rms_norm_eps", "tie_word_embeddings", "bos_token_id", "pad_token_id")
    return {
        "architectures": [architecture], "model_type": model_type, "transformers_version": "5.23.0", "dtype": config.dtype or "float32",
        "attention_bias": False, "attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": True,
        "layer_types": ["full_attention" if config.window(i) is None else "sliding_attention" for i in range(config.num_hidden_layers)],
        "eos_token_id": None if not eos else eos[0] if len(eos) == 1 else list(eos), **{name: getattr(config, name) for name in as_is},
    }  # fmt: skip


def whole(raw: Raw, key: str) -> int:
    """A positive whole number."""
    value = raw.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**31:
        raise refused(key, value, "a positive whole number is needed")
    return value


def number(raw: Raw, key: str) -> float:
    """A positive number."""
    value = raw.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise refused(key, value, "a positive number is needed")
    return float(value)


def token_ids(value: object, key: str) -> tuple[int, ...]:
    """One id, a list of ids or nothing, as a tuple."""
    ids: list[Any] = list(value) if isinstance(value, list | tuple) else [] if value is None else [value]
    if any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
        raise refused(key, value, "a token id or a list of them is needed")
    return tuple(ids)


def table(raw: Raw, key: str) -> dict[str, object]:
    """A JSON object, empty if absent or null."""
    value = raw.get(key)
    if value is not None and not isinstance(value, dict):
        raise refused(key, value, "an object is needed")
    return dict(value or {})


def refuse_unless(raw: Raw, key: str, honoured: object) -> None:
    """Refuse a key that asks for arithmetic we do not have."""
    if raw.get(key) not in (None, honoured):
        raise refused(key, raw[key], f"only {honoured!r} is supported")


def refuse_method(raw: object) -> None:
    """Refuse a `quantization_config` of any other kind than bitsandbytes' NF4."""
    remedy = "use the unquantised checkpoint, or one in bitsandbytes' NF4"
    given = raw if isinstance(raw, Mapping) else {}
    bits = "LLM.int8" if given.get("load_in_8bit") else given.get("bnb_4bit_quant_type", "fp4") if given.get("load_in_4bit") else ""
    kind = f"{given.get('quant_method', raw)} {bits}".strip()
    if kind != "bitsandbytes nf4":
        raise UserError(f"config.json: quantization_config asks for {kind}, which is not read", remedy=remedy)
    if given.get("bnb_4bit_quant_storage", "uint8") != "uint8":
        raise refused("bnb_4bit_quant_storage", given["bnb_4bit_quant_storage"], "only uint8 is read")


def refused(key: str, value: object, why: str) -> UserError:
    """The error for a key of config.json."""
    return UserError(f"config.json: {key} is {value!r}; {why}", remedy="use a checkpoint of a supported model, or correct its config.json")
