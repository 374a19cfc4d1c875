"""Causal attention inside documents that lie end to end, without a mask of T x S.

Documents of equal length share one call. A sliding window longer than the document changes nothing; a shorter one is computed in
blocks: W queries against the W keys of their own block and the W before it, under one W x 2W mask that all blocks share.
On CUDA with 16-bit floats torch's variable-length FlashAttention takes the whole pack at once.

Limits: without CUDA, many documents of different lengths cost one call each.

Shape suffixes: T packed tokens, B documents, L their length, W window, N query heads, M key/value heads, H head width.
"""

from collections.abc import Sequence
from inspect import signature
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def packed_attention(q_TNH: Tensor, k_TMH: Tensor, v_TMH: Tensor, bounds: Sequence[int], *, scale: float, window: int | None) -> Tensor:
    """A token sees itself and the earlier tokens of its document, at most `window` in all. `bounds` are offsets 0, ..., T."""
    lengths = [end - start for start, end in pairwise(bounds)]
    if len(set(lengths)) == 1:
        whole = (t.view(len(lengths), lengths[0], *t.shape[1:]) for t in (q_TNH, k_TMH, v_TMH))
        return causal(*whole, scale=scale, window=window).flatten(0, 1)
    pieces = list(zip(*(torch.split(t, lengths) for t in (q_TNH, k_TMH, v_TMH)), strict=True))
    out: list[Tensor | None] = [None] * len(lengths)
    for length in dict.fromkeys(lengths):
        members = [i for i, other in enumerate(lengths) if other == length]
        batch = (torch.stack(parts) for parts in zip(*(pieces[i] for i in members), strict=True))
        for i, o_LNH in zip(members, causal(*batch, scale=scale, window=window).unbind(0), strict=True):
            out[i] = o_LNH
    return torch.cat([o for o in out if o is not None])


def varlen_attention(
    q_TNH: Tensor, k_TMH: Tensor, v_TMH: Tensor, bounds_B: Tensor, longest: int, *, scale: float, window: int | None
) -> Tensor:
    """The same on CUDA. `bounds_B` is int32 on the device, `longest` the longest document; `window` counts the token itself."""
    from torch.nn.attention.varlen import varlen_attn  # a second of torch's compiler, which a CPU never needs

    left = -1 if window is None else window - 1
    grouped: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in signature(varlen_attn).parameters else {}
    if not grouped:  # torch 2.11
        k_TMH, v_TMH = (t.repeat_interleave(q_TNH.shape[1] // t.shape[1], 1) for t in (k_TMH, v_TMH))
    out = varlen_attn(q_TNH, k_TMH, v_TMH, bounds_B, bounds_B, longest, longest, scale=scale, window_size=(left, 0), **grouped)
    assert isinstance(out, Tensor), type(out)
    return out


def causal(q_BLNH: Tensor, k_BLMH: Tensor, v_BLMH: Tensor, *, scale: float, window: int | None) -> Tensor:
    """Causal attention of a batch of documents of one length."""
    if window is None or q_BLNH.shape[1] <= window:
        return sdpa(q_BLNH, k_BLMH, v_BLMH, scale=scale, mask=None)
    return _blocks(q_BLNH, k_BLMH, v_BLMH, scale=scale, window=window)


def sdpa(q_BLNH: Tensor, k_BSMH: Tensor, v_BSMH: Tensor, *, scale: float, mask: Tensor | None) -> Tensor:
    """torch's attention in our axis order; causal when there is no mask (True = visible)."""
    q, k, v = (t.transpose(1, 2) for t in (q_BLNH, k_BSMH, v_BSMH))
    if q.device.type in ("cpu", "meta") and torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        # Training in bf16 is no faster on CPU, and compiles itself anew for every length: three times the time at 200 tokens.
        q, k, v = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in (q, k, v))
    if q.is_meta:  # what torch takes on CPU; on meta it would take the definition
        o = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, mask is None, attn_mask=mask, scale=scale)[0]
    else:
        is_grouped = q.shape[1] != k.shape[1]
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=is_grouped)
    out: Tensor = o.transpose(1, 2).to(q_BLNH.dtype)
    return out


def window_mask(rows: int, keys: int, window: int, device: torch.device) -> Tensor:
    """Who sees whom when the last of `rows` queries stands at the last of `keys` keys; True = visible."""
    back = torch.arange(keys - rows, keys, device=device)[:, None] - torch.arange(keys, device=device)
    return (back >= 0) & (back < window)


def _blocks(q_BLNH: Tensor, k_BLMH: Tensor, v_BLMH: Tensor, *, scale: float, window: int) -> Tensor:
    batch, length = q_BLNH.shape[:2]
    full = length // window
    end = full * window
    out = [sdpa(q_BLNH[:, :window], k_BLMH[:, :window], v_BLMH[:, :window], scale=scale, mask=None)]
    if full > 1:
        q = q_BLNH[:, window:end].reshape(-1, window, *q_BLNH.shape[2:])
        k, v = (_with_block_before(t[:, :end].view(batch, full, window, *t.shape[2:])) for t in (k_BLMH, v_BLMH))
        o = sdpa(q, k, v, scale=scale, mask=window_mask(window, 2 * window, window, q.device))
        out.append(o.reshape(batch, end - window, *q_BLNH.shape[2:]))
    if end < length:
        mask = window_mask(length - end, length - end + window, window, q_BLNH.device)
        out.append(sdpa(q_BLNH[:, end:], k_BLMH[:, end - window :], v_BLMH[:, end - window :], scale=scale, mask=mask))
    return torch.cat(out, dim=1)


def _with_block_before(t_BCWMH: Tensor) -> Tensor:
    """Each block but the first, behind the block before it: [B * (C - 1), 2W, M, H]."""
    return torch.cat([t_BCWMH[:, :-1], t_BCWMH[:, 1:]], dim=2).flatten(0, 1)
