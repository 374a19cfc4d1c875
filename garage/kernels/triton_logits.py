"""`logits.py` in Triton: a row per program, once over it for its largest logit and sum of exp (online, fp32), once to write the gradient.

The second pass finds most of the row in the cache. Softmax minus one-hot is rounded once, so a confident target keeps its gradient.

Shape suffixes: R rows, V vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from garage.kernels.logits import Rows

BLOCK = 4096


@triton.jit
def _capped(z, softcap):
    """softcap * tanh(z / softcap), in fp32."""
    z = z.to(tl.float32)
    if softcap is not None:
        z = softcap * (2.0 * tl.sigmoid(2.0 * z / softcap) - 1.0)
    return z


@triton.jit
def _cross_entropy(
    logits_ptr, targets_ptr, scale_ptr, loss_ptr, logsumexp_ptr, hit_ptr, vocabulary, stride, scale_stride, softcap, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    target = tl.load(targets_ptr + row)
    picked = _capped(tl.load(logits_ptr + target), softcap)
    top, total = tl.full((), -3e38, tl.float32), tl.full((), 0.0, tl.float32)
    for start in range(0, vocabulary, BLOCK):
        column = start + tl.arange(0, BLOCK)
        z = _capped(tl.load(logits_ptr + column, column < vocabulary, 0.0), softcap)
        z = tl.where(column < vocabulary, z, float("-inf"))
        higher = tl.maximum(top, tl.max(z, 0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(z - higher), 0)
        top = higher
    logsumexp = top + tl.log(total)
    tl.store(loss_ptr + row, logsumexp - picked)
    tl.store(logsumexp_ptr + row, logsumexp)
    tl.store(hit_ptr + row, picked >= top)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + row * scale_stride).to(tl.float32)
        for start in range(0, vocabulary, BLOCK):
            column = start + tl.arange(0, BLOCK)
            z = _capped(tl.load(logits_ptr + column, column < vocabulary, 0.0), softcap)
            slope = (tl.exp(z - logsumexp) - tl.where(column == target, 1.0, 0.0)) * scale
            if softcap is not None:
                slope *= 1.0 - (z / softcap) * (z / softcap)
            tl.store(logits_ptr + column, slope, column < vocabulary)


def cross_entropy_(logits_RV: Tensor, targets_R: Tensor, *, scale: float | Tensor | None, softcap: float | None = None) -> Rows:
    """See `logits.cross_entropy_`."""
    assert logits_RV.stride(1) == 1 and targets_R.is_contiguous(), (logits_RV.stride(), targets_R.stride())
    loss_R, logsumexp_R = torch.empty(2, len(logits_RV), dtype=torch.float32, device=logits_RV.device)
    is_hit_R = torch.empty(len(logits_RV), dtype=torch.bool, device=logits_RV.device)
    factor = torch.full((1,), scale, device=logits_RV.device) if isinstance(scale, float) else scale
    step = 0 if factor is None or len(factor) == 1 else factor.stride(0)
    sizes = (logits_RV.shape[1], logits_RV.stride(0), step, softcap)
    block = min(BLOCK, triton.next_power_of_2(logits_RV.shape[1]))
    _cross_entropy[(len(logits_RV),)](
        logits_RV, targets_R, factor, loss_R, logsumexp_R, is_hit_R, *sizes, BLOCK=block, num_warps=8 if block == BLOCK else 4
    )
    return Rows(loss_R, logsumexp_R, is_hit_R)
