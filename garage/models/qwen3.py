"""Qwen 3, dense (arXiv 2505.09388). Pre-norm, full attention everywhere, SwiGLU, normed queries and keys.

The head width times the number of heads is not the model width for most sizes.
Shape suffixes: T packed tokens, D model width.
"""

from collections.abc import Mapping
from dataclasses import dataclass

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
from garage.models.layers import Angles, Attend, Attention, Block, Decoder, GatedMLP, Model, RMSNorm, rotary_angles

_ROPE = Rope(theta=1_000_000.0)


@dataclass(frozen=True, kw_only=True)
class Qwen3Config(Config):
    """Its shape; `rope` is the same for all layers."""

    rope: Rope = _ROPE

    def window(self, layer: int) -> int | None:
        return None


class Qwen3Block(Block):
    """Attention and MLP, each behind a norm."""

    def __init__(self, c: Qwen3Config, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = Attention(c, layer, scale=c.head_dim**-0.5)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = GatedMLP(c, "silu")

    @property
    def norms(self) -> tuple[RMSNorm, None, RMSNorm, None]:
        return self.input_layernorm, None, self.post_attention_layernorm, None

    def mix(self, x_TD: Tensor, angles: Angles, attend: Attend) -> Tensor:
        return x_TD + self.self_attn(self.input_layernorm(x_TD), angles, attend)  # type: ignore[no-any-return]

    def feed(self, x_TD: Tensor) -> Tensor:
        return x_TD + self.mlp(self.post_attention_layernorm(x_TD))  # type: ignore[no-any-return]


class Qwen3(Model):
    """The language model."""

    config: Qwen3Config

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__(config, Decoder(config, (Qwen3Block(config, i) for i in range(config.num_hidden_layers))))

    def forward(self, tokens_T: Tensor, positions_T: Tensor, attend: Attend) -> Tensor:
        x_TD = self.embed(tokens_T)
        angles = rotary_angles(positions_T, self.config.rope, self.config.head_dim, x_TD.dtype)
        for block in self.model.layers:
            x_TD = block(x_TD, angles, attend)
        return self.model.norm(x_TD)  # type: ignore[no-any-return]


def read(raw: Mapping[str, object]) -> Qwen3Config:
    """From the keys of any vintage of `config.json`."""
    refuse_unless(raw, "use_sliding_window", False)
    refuse_unless(raw, "hidden_act", "silu")
    defaults = {"head_dim": 128, "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
    fields = shared_fields(raw, defaults)
    if "sliding_attention" in (layer_types(raw, whole(raw, "num_hidden_layers")) or ()):
        raise refused("layer_types", "sliding_attention", "Qwen 3 attends to everything")
    flat = {"rope_theta": raw["rope_theta"]} if raw.get("rope_theta") else {}
    ropes = {**flat, **table(raw, "rope_scaling"), **table(raw, "rope_parameters")}
    rope = read_rope(ropes, theta=_ROPE.theta, positions=whole({**defaults, **raw}, "max_position_embeddings"))
    return Qwen3Config(**fields, rope=rope)  # type: ignore[arg-type]


def write(config: Qwen3Config) -> dict[str, object]:
    """What transformers 5 writes for it."""
    return base_json(config, model_type="qwen3", architecture="Qwen3ForCausalLM") | {
        "hidden_act": "silu", "max_window_layers": 28, "rope_parameters": rope_json(config.rope),
        "sliding_window": None, "use_sliding_window": False,
    }  # fmt: skip


def _size(layers: int, width: int, mlp: int, heads: int, *, is_tied: bool) -> Qwen3Config:
    return Qwen3Config(
        num_hidden_layers=layers, hidden_size=width, intermediate_size=mlp, num_attention_heads=heads, tie_word_embeddings=is_tied,
        vocab_size=151936, num_key_value_heads=8, head_dim=128, max_position_embeddings=40960,
        bos_token_id=151643, eos_token_id=(151645,), dtype="bfloat16",
    )  # fmt: skip


SIZES = {
    "qwen3-0.6b": _size(28, 1024, 3072, 16, is_tied=True),
    "qwen3-1.7b": _size(28, 2048, 6144, 16, is_tied=True),
    "qwen3-4b": _size(36, 2560, 9728, 32, is_tied=True),
    "qwen3-8b": _size(36, 4096, 12288, 32, is_tied=False),
    "qwen3-14b": _size(40, 5120, 17408, 40, is_tied=False),
    "qwen3-32b": _size(64, 5120, 25600, 64, is_tied=False),
}
