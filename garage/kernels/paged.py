"""Attention over keys and values that lie in pages shared by all requests.

A pool is [pages, page size, M, H]; a request's block table lists its pages in order. All requests that feed one token (decode) are
one call over their gathered pages, padded to the longest; the query heads of a key/value head stand where queries usually do, so
nothing is repeated. A request that feeds many tokens (prefill) attends on its own: directly when it starts at position 0, else over
its gathered pages in slices of `ROWS` queries, so a mask never exceeds `ROWS` x S. With a window, pages that no query can see are
not gathered.

A pool of e4m3 numbers has scale 1; what lies beyond 448 is cut off.

A page is zeroed when its first slot is written: what an earlier owner left, NaN included, cannot reach a sum.

Shape suffixes: T tokens of the step, B requests, P pages of one request, S context, N query heads, M key/value heads, H head width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from garage.kernels.packed import causal, sdpa, window_mask

ROWS = 256


@dataclass(frozen=True)
class Gather:
    """Which pages a batch of single-token requests reads, and which of the gathered slots each may see."""

    rows_B: Tensor
    pages_BP: Tensor
    visible_BS: Tensor


def write(pool: Tensor, fresh_P: Tensor, slots_T: Tensor, new_TMH: Tensor) -> None:
    """Put this step's keys or values into their slots (page * page size + offset)."""
    if len(fresh_P):
        pool[fresh_P] = 0
    if pool.dtype == torch.float8_e4m3fn:  # copied as bytes
        pool, new_TMH = pool.view(torch.uint8), new_TMH.clamp(-448, 448).to(pool.dtype).view(torch.uint8)
    pool.flatten(0, 1).index_copy_(0, slots_T, new_TMH.to(pool.dtype))


def plan_gather(rows_B: Tensor, tables_BP: Tensor, contexts_B: Tensor, *, page_size: int, window: int | None) -> Gather:
    """The pages from the first visible one to the last used one; shorter requests repeat their last page, masked."""
    first_B = contexts_B - window if window is not None else torch.zeros_like(contexts_B)
    first_B = first_B.clamp(min=0)
    start_B, last_B = first_B // page_size, (contexts_B - 1) // page_size
    wide = int((last_B - start_B).max()) + 1
    columns_BP = start_B[:, None] + torch.arange(wide, device=tables_BP.device)
    pages_BP = tables_BP.gather(1, columns_BP.minimum(last_B[:, None]))
    positions_BS = (start_B * page_size)[:, None] + torch.arange(wide * page_size, device=tables_BP.device)
    return Gather(rows_B, pages_BP, (positions_BS >= first_B[:, None]) & (positions_BS < contexts_B[:, None]))


def decode(q_BNH: Tensor, keys: Tensor, values: Tensor, gather: Gather, *, scale: float) -> Tensor:
    """One token of each request against its context: one call for all of them."""
    k_BMSH, v_BMSH = (pool[gather.pages_BP].flatten(1, 2).transpose(1, 2) for pool in (keys, values))
    q = q_BNH.view(len(q_BNH), keys.shape[2], -1, q_BNH.shape[2])
    mask = gather.visible_BS[:, None, None].expand(-1, -1, q.shape[2], -1)
    return F.scaled_dot_product_attention(q, k_BMSH.to(q.dtype), v_BMSH.to(q.dtype), attn_mask=mask, scale=scale).flatten(1, 2)


def prefill(q_LNH: Tensor, keys: Tensor, values: Tensor, table_P: Tensor, context: int, *, scale: float, window: int | None) -> Tensor:
    """The last L tokens of one request against its context, which may be longer than L."""
    page_size = keys.shape[1]
    first = 0 if window is None else max(0, context - len(q_LNH) + 1 - window) // page_size
    pages = table_P[first : (context - 1) // page_size + 1]
    seen = context - first * page_size
    k_SMH, v_SMH = (pool[pages].flatten(0, 1)[:seen].to(q_LNH.dtype) for pool in (keys, values))
    if seen == len(q_LNH):
        return causal(q_LNH[None], k_SMH[None], v_SMH[None], scale=scale, window=window)[0]
    out = []
    for start in range(0, len(q_LNH), ROWS):
        q = q_LNH[start : start + ROWS]
        end = seen - len(q_LNH) + start + len(q)
        mask = window_mask(len(q), end, window or end, q.device)
        out.append(sdpa(q[None], k_SMH[None, :end], v_SMH[None, :end], scale=scale, mask=mask)[0])
    return torch.cat(out)
