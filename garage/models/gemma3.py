"""Gemma 3, the text part (arXiv 2503.19786). Five sliding-window layers for each full one, with rotary bases of their own.

Norms multiply by (1 + w) and stand before and after each sublayer; the ones after act on the branch, before the add. The embedding
is multiplied by sqrt(D) rounded to the dtype of the activations; the head, its transpose, is not.
The 4B, 12B and 27B checkpoints carry a vision tower, which is skipped.
Shape suffixes: T packed tokens, D model width.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from garage.models.config import (
    Config,
    Rope,
    base_json,
    layer_types,
    read_rope,
    refuse_unless,
    refused,
    rope_json,
    shared_fields,
    table,
    whole,
)
from garage.models.layers import Angles, Attend, Attention, Block, Decoder, GatedMLP, Model, RMSNorm, rotary_angles, rounded

_ROPE, _ROPE_SLIDING = Rope(theta=1_000_000.0), Rope(theta=10_000.0)
_EVERY = 6
_DEFAULTS = {
    "vocab_size": 262_208, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "query_pre_attn_scalar": 256,
    "max_position_embeddings": 131_072, "rms_norm_eps": 1e-6, "sliding_window": 4096, "tie_word_embeddings": True,
    "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Gemma3Config(Config):
    """Its shape; queries are scaled by query_pre_attn_scalar^-1/2, which is not the head width at 27B."""

    query_pre_attn_scalar: float
    sliding_window: int
    layer_types: tuple[str, ...]
    rope: Rope = _ROPE
    rope_sliding: Rope = _ROPE_SLIDING

    def window(self, layer: int) -> int | None:
        return None if self.layer_types[layer] == "full_attention" else self.sliding_window


class Gemma3Block(Block):
    """Attention and MLP, each between two norms."""

    def __init__(self, c: Gemma3Config, layer: int) -> None:
        super().__init__()
        norm = partial(RMSNorm, c.hidden_size, c.rms_norm_eps, offset=1.0)
        self.input_layernorm = norm()
        self.self_attn = Attention(c, layer, scale=c.query_pre_attn_scalar**-0.5, norm_offset=1.0)
        self.post_attention_layernorm = norm()
        self.pre_feedforward_layernorm = norm()
        self.mlp = GatedMLP(c, "gelu_tanh")
        self.post_feedforward_layernorm = norm()

    @property
    def norms(self) -> tuple[RMSNorm, RMSNorm, RMSNorm, RMSNorm]:
        return self.input_layernorm, self.post_attention_layernorm, self.pre_feedforward_layernorm, self.post_feedforward_layernorm

    def mix(self, x_TD: Tensor, angles: Angles, attend: Attend) -> Tensor:
        y_TD = self.self_attn(self.input_layernorm(x_TD), angles, attend)
        return x_TD + self.post_attention_layernorm(y_TD)  # type: ignore[no-any-return]

    def feed(self, x_TD: Tensor) -> Tensor:
        y_TD = self.mlp(self.pre_feedforward_layernorm(x_TD))
        return x_TD + self.post_feedforward_layernorm(y_TD)  # type: ignore[no-any-return]


class Gemma3(Model):
    """The language model."""

    config: Gemma3Config

    def __init__(self, config: Gemma3Config) -> None:
        super().__init__(config, Decoder(config, (Gemma3Block(config, i) for i in range(config.num_hidden_layers)), norm_offset=1.0))

    def forward(self, tokens_T: Tensor, positions_T: Tensor, attend: Attend) -> Tensor:
        c = self.config
        x_TD = self.embed(tokens_T)
        x_TD = x_TD * rounded(c.hidden_size**0.5, x_TD.dtype)
        full, sliding = (rotary_angles(positions_T, rope, c.head_dim, x_TD.dtype) for rope in (c.rope, c.rope_sliding))
        for layer, block in enumerate(self.model.layers):
            x_TD = block(x_TD, full if c.window(layer) is None else sliding, attend)
        return self.model.norm(x_TD)  # type: ignore[no-any-return]


def read(raw: Mapping[str, object]) -> Gemma3Config:
    """From the keys of any vintage of `config.json`, text-only or multimodal; published files leave class defaults out."""
    if raw.get("model_type") == "gemma3":
        outer = {key: raw[key] for key in ("dtype", "torch_dtype", "eos_token_id", "quantization_config") if raw.get(key) is not None}
        raw = {**table(raw, "text_config"), **outer}
    for key, honoured in {"use_bidirectional_attention": False, "attn_logit_softcapping": None, "final_logit_softcapping": None}.items():
        refuse_unless(raw, key, honoured)
    refuse_unless(raw, "hidden_activation", "gelu_pytorch_tanh")
    raw = {**_DEFAULTS, **raw}
    full, sliding = _ropes(raw)
    fields = shared_fields(raw, _DEFAULTS) | {key: whole(raw, key) for key in ("query_pre_attn_scalar", "sliding_window")}
    return Gemma3Config(**fields, layer_types=_layer_types(raw), rope=full, rope_sliding=sliding)  # type: ignore[arg-type]


def write(config: Gemma3Config) -> dict[str, object]:
    """What transformers 5 writes for it."""
    ropes = {"full_attention": rope_json(config.rope), "sliding_attention": rope_json(config.rope_sliding)}
    return base_json(config, model_type="gemma3_text", architecture="Gemma3ForCausalLM") | {
        "_sliding_window_pattern": _EVERY, "attn_logit_softcapping": None, "final_logit_softcapping": None, "rope_parameters": ropes,
        "hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": config.query_pre_attn_scalar,
        "sliding_window": config.sliding_window, "use_bidirectional_attention": False,
    }  # fmt: skip


def pattern(count: int, every: int = _EVERY) -> tuple[str, ...]:
    """Every `every`-th layer attends to everything."""
    return tuple("sliding_attention" if (i + 1) % every else "full_attention" for i in range(count))


def _layer_types(raw: Mapping[str, object]) -> tuple[str, ...]:
    """The list wins over the pattern keys of older files."""
    count = whole(raw, "num_hidden_layers")
    old = {"every": raw.get("sliding_window_pattern") or raw.get("_sliding_window_pattern") or _EVERY}
    return layer_types(raw, count) or pattern(count, whole(old, "every"))


def _ropes(raw: Mapping[str, object]) -> tuple[Rope, Rope]:
    """Full and sliding layers. Old flat keys fill what the new table lacks; a flat rope_scaling belongs to the full layers alone."""
    new, positions = table(raw, "rope_parameters"), whole(raw, "max_position_embeddings")
    if new and not {"full_attention", "sliding_attention"} & set(new):
        raise refused("rope_parameters", new, "Gemma 3 has one entry for full_attention and one for sliding_attention")
    full = {"rope_theta": raw.get("rope_theta") or _ROPE.theta, **table(raw, "rope_scaling"), **table(new, "full_attention")}
    sliding = {"rope_theta": raw.get("rope_local_base_freq") or _ROPE_SLIDING.theta, **table(new, "sliding_attention")}
    return read_rope(full, theta=_ROPE.theta, positions=positions), read_rope(sliding, theta=_ROPE_SLIDING.theta, positions=positions)


def _size(layers: int, width: int, mlp: int, heads: tuple[int, int], *, head_dim: int = 256, scalar: int = 256) -> Gemma3Config:
    is_large = layers > 26
    return Gemma3Config(
        num_hidden_layers=layers, hidden_size=width, intermediate_size=mlp, num_attention_heads=heads[0], num_key_value_heads=heads[1],
        head_dim=head_dim, query_pre_attn_scalar=scalar, layer_types=pattern(layers), vocab_size=262_208 if is_large else 262_144,
        sliding_window=1024 if is_large else 512, max_position_embeddings=131_072 if is_large else 32_768,
        rope=Rope(theta=_ROPE.theta, kind="linear", factor=8.0) if is_large else _ROPE,
        bos_token_id=2, eos_token_id=(1, 106), pad_token_id=0, dtype="bfloat16",
    )  # fmt: skip


SIZES = {
    "gemma3-270m": _size(18, 640, 2048, (4, 1)),
    "gemma3-1b": _size(26, 1152, 6912, (4, 1)),
    "gemma3-4b": _size(34, 2560, 10240, (8, 4)),
    "gemma3-12b": _size(48, 3840, 15360, (16, 8)),
    "gemma3-27b": _size(62, 5376, 21504, (32, 16), head_dim=128, scalar=168),
}
