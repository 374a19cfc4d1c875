"""Building blocks of every family. Nothing here knows about batching, caching or training.

The batch is flat: T packed tokens, documents end to end, no padding. Attention is asked for through `attend`; where keys and values
live is the caller's business. Module names are those of the published safetensors, so loading needs no conversion.

Activations have the dtype of the embedding's output, or of `Model.compute_dtype` if that is set; a weight of another dtype (fp32
master weights, a frozen bf16 base under fp32 adapters) is cast where it is used.

Shape suffixes: T packed tokens, D model width, F MLP width, N query heads, M key/value heads, H head width, V vocabulary.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from functools import cache
from typing import Protocol

import torch
from torch import Tensor, nn

from garage.kernels import dispatch
from garage.models.config import Config, Rope

Angles = tuple[Tensor, Tensor]


class Attend(Protocol):
    """Where keys and values live is the caller's business; the model only asks for the mix."""

    def __call__(self, q_TNH: Tensor, k_TMH: Tensor, v_TMH: Tensor, *, layer: int, scale: float, window: int | None) -> Tensor: ...


class Linear(nn.Module):
    """x W^T without bias. `weight` [out, in] is not initialised."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    def forward(self, x_TI: Tensor) -> Tensor:
        return dispatch.linear(x_TI, self.weight)

    @staticmethod
    def holding(weight_OI: Tensor) -> "Linear":
        """The linear of a given, frozen matrix."""
        with torch.device("meta"):
            linear = Linear(weight_OI.shape[1], weight_OI.shape[0])
        linear.weight = nn.Parameter(weight_OI, requires_grad=False)
        return linear

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight in `dtype`, however it is held."""
        return dispatch.dense(self.weight, dtype)


class Embedding(nn.Module):
    """One row of `weight` [V, D] per token."""

    def __init__(self, num_embeddings: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_embeddings, width))

    def forward(self, tokens_T: Tensor) -> Tensor:
        return dispatch.lookup(tokens_T, self.weight)


class RMSNorm(nn.Module):
    """Plain form (Qwen): rounded, then times w. Offset form (Gemma): times (1 + w) in fp32, then rounded; files store w."""

    def __init__(self, width: int, eps: float, *, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps, self.offset = eps, offset

    def forward(self, x: Tensor) -> Tensor:
        return dispatch.rms_norm(x, self.weight, eps=self.eps, offset=self.offset, rounds_first=not self.offset)


    def turned(self, x_TNH: Tensor, angles: Angles) -> Tensor:
        """The norm of each head, turned by its position."""
        form = {"eps": self.eps, "offset": self.offset, "rounds_first": not self.offset}
        return dispatch.norm_rotate(x_TNH, self.weight, angles, **form)  # type: ignore[arg-type]


class Attention(nn.Module):
    """Grouped-query attention with normed queries and keys."""

    def __init__(self, c: Config, layer: int, *, scale: float, norm_offset: float = 0.0) -> None:
        super().__init__()
        self.layer, self.scale, self.window, self.head_dim = layer, scale, c.window(layer), c.head_dim
        self.q_proj = Linear(c.hidden_size, c.num_attention_heads * c.head_dim)
        self.k_proj = Linear(c.hidden_size, c.num_key_value_heads * c.head_dim)
        self.v_proj = Linear(c.hidden_size, c.num_key_value_heads * c.head_dim)
        self.o_proj = Linear(c.num_attention_heads * c.head_dim, c.hidden_size)
        self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps, offset=norm_offset)
        self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps, offset=norm_offset)

    def forward(self, x_TD: Tensor, angles: Angles, attend: Attend) -> Tensor:
        q_TNH, k_TMH, v_TMH = (proj(x_TD).unflatten(-1, (-1, self.head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q_TNH, k_TMH = self.q_norm.turned(q_TNH, angles), self.k_norm.turned(k_TMH, angles)
        o_TNH = attend(q_TNH, k_TMH, v_TMH, layer=self.layer, scale=self.scale, window=self.window)
        return self.o_proj(o_TNH.flatten(-2))  # type: ignore[no-any-return]


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x)); `activation` is "silu" or "gelu_tanh"."""

    def __init__(self, c: Config, activation: str) -> None:
        super().__init__()
        self.gate_proj = Linear(c.hidden_size, c.intermediate_size)
        self.up_proj = Linear(c.hidden_size, c.intermediate_size)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size)
        self.activation = activation

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down_proj(dispatch.gated(self.gate_proj(x_TD), self.up_proj(x_TD), activation=self.activation))  # type: ignore[no-any-return]


class Block(nn.Module, ABC):
    """A decoder layer in two halves, so that a trainer can compute them again one at a time (`models.recompute`)."""

    @abstractmethod
    def mix(self, x_TD: Tensor, angles: Angles, attend: Attend) -> Tensor:
        """The half with attention, where tokens see each other."""

    @abstractmethod
    def feed(self, x_TD: Tensor) -> Tensor:
        """The half with the MLP, each token on its own."""

    @property
    @abstractmethod
    def norms(self) -> "tuple[RMSNorm, RMSNorm | None, RMSNorm, RMSNorm | None]":
        """Those before and after attention, and before and after the MLP."""

    def forward(self, x_TD: Tensor, angles: Angles, attend: Attend) -> Tensor:
        return self.feed(self.mix(x_TD, angles, attend))


class Decoder(nn.Module):
    """The parts under `model.` in the files: embedding, blocks, last norm."""

    def __init__(self, c: Config, blocks: Iterable[nn.Module], *, norm_offset: float = 0.0) -> None:
        super().__init__()
        self.embed_tokens = Embedding(c.vocab_size, c.hidden_size)
        self.layers = nn.ModuleList(blocks)
        self.norm = RMSNorm(c.hidden_size, c.rms_norm_eps, offset=norm_offset)


class Model(nn.Module, ABC):
    """What every family is from outside.

    Attributes:
        config: its configuration.
        compute_dtype: dtype of the activations; None is that of the embedding. Set it to train fp32 weights in bf16.
    """

    def __init__(self, config: Config, decoder: Decoder) -> None:
        super().__init__()
        self.config = config
        self.model = decoder
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self.compute_dtype: torch.dtype | None = None
        self.tie()

    def tie(self) -> None:
        """Make the head the embedding's own matrix, if the config says so; call it after replacing either."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def embed(self, tokens_T: Tensor) -> Tensor:
        """The input of the first block."""
        x_TD: Tensor = self.model.embed_tokens(tokens_T)
        return x_TD if self.compute_dtype is None else x_TD.to(self.compute_dtype)

    @abstractmethod
    def forward(self, tokens_T: Tensor, positions_T: Tensor, attend: Attend) -> Tensor:
        """Hidden states [T, D] after the last norm; call `logits` on the rows you need."""

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """Scores of every vocabulary row [T, V], padded rows included."""
        return self.lm_head(hidden_TD)  # type: ignore[no-any-return]


def inverse_frequencies(rope: Rope, head_dim: int) -> tuple[Tensor, float]:
    """Radians per position of each of the H/2 pairs (fp32), and what cos and sin are multiplied by."""
    pairs = torch.arange(0, head_dim, 2, dtype=torch.float64, device="cpu")
    freq = rope.theta ** (-pairs / head_dim)
    if rope.kind == "default":
        return freq.float(), 1.0
    if rope.kind == "linear":
        return (freq / rope.factor).float(), 1.0
    low, high = (_turns(rope, head_dim, beta) for beta in (rope.beta_fast, rope.beta_slow))
    low, high = max(math.floor(low), 0), min(math.ceil(high), head_dim - 1)
    ramp = ((pairs / 2 - low) / (high - low if high > low else 0.001)).clamp(0, 1)
    gain = rope.attention_factor if rope.attention_factor is not None else 0.1 * math.log(max(rope.factor, 1.0)) + 1.0
    return (freq * (1 - ramp) + freq / rope.factor * ramp).float(), gain


def rotary_angles(positions_T: Tensor, rope: Rope, head_dim: int, dtype: torch.dtype) -> Angles:
    """cos and sin [T, H/2], computed in fp32 and cast to `dtype`."""
    freq_H, gain = _frequencies(rope, head_dim, positions_T.device)
    angle_TH = positions_T[:, None].float() * freq_H
    return (angle_TH.cos() * gain).to(dtype), (angle_TH.sin() * gain).to(dtype)


@cache
def _frequencies(rope: Rope, head_dim: int, device: torch.device) -> tuple[Tensor, float]:
    """They stay on the device: a step that is captured as a graph may copy nothing from the host."""
    with torch.inference_mode(False):
        freq_H, gain = inverse_frequencies(rope, head_dim)
        return freq_H.to(device), gain


@cache
def rounded(number: float, dtype: torch.dtype) -> float:
    """The number as `dtype` holds it."""
    return float(torch.tensor(number, dtype=dtype, device="cpu"))


def _turns(rope: Rope, head_dim: int, beta: float) -> float:
    """The pair that turns `beta` times within the original context (YaRN, equation 17)."""
    return head_dim * math.log(rope.original / (2 * math.pi * beta)) / (2 * math.log(rope.theta))
