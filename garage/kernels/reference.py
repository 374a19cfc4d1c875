"""What each op means, in plain torch: the definition that every faster path is tested against.

Slow and large on purpose; only tests and `ReferenceAttend` call it.

Shape suffixes: T packed tokens, S context, D model width, N query heads, M key/value heads, H head width, V vocabulary.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def rms_norm(x: Tensor, weight: Tensor, *, eps: float, offset: float, rounds_first: bool) -> Tensor:
    """x / rms(x) * (weight + offset); `rounds_first` rounds to x's dtype before the weight (Qwen), else after it (Gemma)."""
    wide = torch.promote_types(x.dtype, torch.float32)
    normal = x.to(wide) * torch.rsqrt(x.to(wide).square().mean(-1, keepdim=True) + eps)
    if rounds_first:
        return normal.to(x.dtype) * (weight + offset).to(x.dtype)
    return (normal * (weight.to(wide) + offset)).to(x.dtype)


def rotate(x_TNH: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> Tensor:
    """Rotary positions in halves: channel j turns with channel j + H/2. `cos_TH` and `sin_TH` hold H/2 angles."""
    a, b = x_TNH.chunk(2, dim=-1)
    cos, sin = cos_TH[:, None], sin_TH[:, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def gated(gate: Tensor, up: Tensor, *, activation: str) -> Tensor:
    """silu(gate) * up, or the tanh form of gelu(gate) * up."""
    return (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up


def attention(q_TNH: Tensor, k_SMH: Tensor, v_SMH: Tensor, visible_TS: Tensor, scale: float) -> Tensor:
    """softmax(q k / sqrt) v over the visible keys, with the softmax in fp32 or wider."""
    group = q_TNH.shape[1] // k_SMH.shape[1]
    k_SNH, v_SNH = k_SMH.repeat_interleave(group, 1), v_SMH.repeat_interleave(group, 1)
    scores_NTS = torch.einsum("tnh,snh->nts", q_TNH, k_SNH).to(torch.promote_types(q_TNH.dtype, torch.float32)) * scale
    weights_NTS = scores_NTS.masked_fill(~visible_TS, -torch.inf).softmax(-1).to(q_TNH.dtype)
    return torch.einsum("nts,snh->tnh", weights_NTS, v_SNH)


def linear_cross_entropy(hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor) -> Tensor:
    """Summed negative log-likelihood of the targets; -100 is not counted."""
    return F.cross_entropy(hidden_TD @ weight_VD.T, targets_T, ignore_index=-100, reduction="sum")
