"""From logits to the next token, for all rows at once, in float32.

Greedy is the argmax. Otherwise, as vLLM orders it: temperature, then min-p, top-k, top-p, then one draw. Filters are thresholds on
the logits, so that ties at the edge are all kept and the result does not depend on how a sort breaks them.

Randomness is counter-based: the draw for the token at position p of a request with seed s is a hash of (s, p), whatever else is in
the batch and whether the request was preempted. The token is found by inverting the cumulative distribution in the order of ids
with that one number. (Rounding of the model's own products may still differ between batches by a few units in the last place.)

Ids at or beyond `vocab_size`, the tokenizer's, are never sampled: models pad their vocabulary.

Log-probabilities are those of the model before temperature and filters, in nats, as vLLM reports them.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from garage.core.types import Sampling, TokenLogprob
from garage.engine.request import Sequence

COLDEST = 1e-5  # lower temperatures are greedy; dividing by them overflows
FIRST_LOOK = 1024  # candidates sorted before the whole vocabulary is
GOLDEN = np.uint64(0x9E3779B97F4A7C15)


Row = tuple[Sequence, int]  # the token to be sampled follows `sequence.tokens[:length]`; later tokens of the sequence are not looked at


@dataclass(frozen=True, slots=True)
class Chosen:
    """One token id per row; `broken` rows had no finite logits and their id means nothing."""

    ids: list[int]
    logprobs: list[TokenLogprob | None]
    broken: frozenset[int]


@dataclass(frozen=True, slots=True)
class Sampled:
    """What was sampled, still on the device of the logits: `ids_R` can feed the next step at once, `read` waits for it."""

    ids_R: Tensor
    is_broken_R: Tensor
    logits_RV: Tensor
    samplings: Seq[Sampling]

    def read(self) -> Chosen:
        """The ids and log-probabilities on the host."""
        ids = self.ids_R.tolist()
        broken = frozenset(b for b, is_broken in enumerate(self.is_broken_R.tolist()) if is_broken)
        return Chosen(ids, _logprobs(self.logits_RV, ids, self.samplings), broken)


def sample(logits_RV: Tensor, rows: Seq[Row], vocab_size: int) -> Sampled:
    """The next token of every row. A sequence may have several rows, one for each drafted token it must be compared with."""
    logits_BV = logits_RV[:, :vocab_size].float()
    best_B, ids_B = logits_BV.max(dim=-1)
    warm = [b for b, (s, _) in enumerate(rows) if s.sampling.temperature >= COLDEST]
    if warm:
        places = torch.tensor(warm, device=logits_BV.device)
        ids_B[places] = _draw(logits_BV if len(warm) == len(rows) else logits_BV[places], [rows[b] for b in warm])
    return Sampled(ids_B, ~best_B.isfinite(), logits_BV, [s.sampling for s, _ in rows])


def uniforms(seeds: Seq[int], positions: Seq[int]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """One number in [0, 1) for each pair: SplitMix64 (Steele, Lea & Flood 2014) seeded with the mixed seed, at the given counter."""
    with np.errstate(over="ignore"):
        start = _mix(np.array(seeds, dtype=np.uint64))
        mixed = _mix(start + GOLDEN * (np.array(positions, dtype=np.uint64) + np.uint64(1)))
    out: np.ndarray[tuple[int], np.dtype[np.float64]] = (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return out


def _mix(z: np.ndarray[tuple[int], np.dtype[np.uint64]]) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _draw(logits_BV: Tensor, rows: Seq[Row]) -> Tensor:
    samplings = [s.sampling for s, _ in rows]
    x_BV = logits_BV / _column([s.temperature for s in samplings], logits_BV)
    x_BV = x_BV - x_BV.amax(dim=-1, keepdim=True)
    filtered = [b for b, s in enumerate(samplings) if s.top_k or s.top_p < 1 or s.min_p]
    if filtered:
        places = torch.tensor(filtered, device=x_BV.device)
        floor_B1 = _floor(x_BV[places], [samplings[b] for b in filtered])
        x_BV[places] = x_BV[places].masked_fill(x_BV[places] < floor_B1, -torch.inf)
    cumulative_BV = x_BV.exp_().cumsum(dim=-1)
    total_B1 = cumulative_BV[:, -1:]
    u_B = uniforms([s.seed for s, _ in rows], [length for _, length in rows])
    target_B1 = torch.from_numpy(u_B).to(total_B1)[:, None] * total_B1
    target_B1 = torch.minimum(target_B1, torch.nextafter(total_B1, torch.zeros_like(total_B1)))  # the product may round up to the total
    return torch.searchsorted(cumulative_BV, target_B1, right=True)[:, 0].clamp_(max=x_BV.shape[1] - 1)


def _floor(x_BV: Tensor, samplings: Seq[Sampling]) -> Tensor:
    """The smallest logit that each row keeps; the largest logit of a row is 0."""
    floor_B1 = _column([s.min_p for s in samplings], x_BV).log()  # log 0 = -inf: no floor
    width = x_BV.shape[1]
    top_k = [min(s.top_k or width, width) for s in samplings]
    look = max((k for k in top_k if k < width), default=0)
    if any(s.top_p < 1 and k == width for s, k in zip(samplings, top_k, strict=True)):
        look = max(look, min(FIRST_LOOK, width))
    sorted_BK = x_BV.topk(look, dim=-1).values if look else x_BV[:, :0]
    limited = [b for b, k in enumerate(top_k) if k < width]
    if limited:
        kth = sorted_BK[limited, [top_k[b] - 1 for b in limited]][:, None]
        floor_B1[limited] = torch.maximum(floor_B1[limited], kth)
    if any(s.top_p < 1 for s in samplings):
        floor_B1 = torch.maximum(floor_B1, _nucleus(x_BV, sorted_BK, floor_B1, _column([s.top_p for s in samplings], x_BV)))
    return floor_B1


def _nucleus(x_BV: Tensor, sorted_BK: Tensor, floor_B1: Tensor, top_p_B1: Tensor) -> Tensor:
    """Smallest logit of the shortest list of most likely tokens that holds `top_p` of what the other filters keep."""
    wanted_B1 = top_p_B1 * x_BV.exp().masked_fill(x_BV < floor_B1, 0).sum(dim=-1, keepdim=True)
    before_BK = _mass_before(sorted_BK, floor_B1)
    enough_B1 = (before_BK[:, -1:] >= wanted_B1) | (sorted_BK[:, -1:] <= floor_B1) | (top_p_B1 >= 1)
    if not bool(enough_B1.all()):
        sorted_BK = x_BV.sort(dim=-1, descending=True).values
        before_BK = _mass_before(sorted_BK, floor_B1)
    kept_BK = (before_BK < wanted_B1) & (sorted_BK >= floor_B1)
    kept_BK[:, 0] = True
    smallest_B1 = sorted_BK.masked_fill(~kept_BK, torch.inf).amin(dim=-1, keepdim=True)
    return smallest_B1.masked_fill(top_p_B1 >= 1, -torch.inf)


def _mass_before(sorted_BK: Tensor, floor_B1: Tensor) -> Tensor:
    mass_BK = sorted_BK.exp().masked_fill(sorted_BK < floor_B1, 0)
    return mass_BK.cumsum(dim=-1) - mass_BK


def _column(values: Seq[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]


def _logprobs(logits_BV: Tensor, ids: Seq[int], samplings: Seq[Sampling]) -> list[TokenLogprob | None]:
    out: list[TokenLogprob | None] = [None] * len(ids)
    asked = [(b, s.logprobs) for b, s in enumerate(samplings) if s.logprobs is not None]
    if not asked:
        return out
    rows = [b for b, _ in asked]
    logp_BV = logits_BV[rows].log_softmax(dim=-1)
    chosen = logp_BV.gather(1, torch.tensor([[ids[b]] for b in rows], device=logp_BV.device))[:, 0].tolist()
    top = logp_BV.topk(min(max(n for _, n in asked), logp_BV.shape[1]), dim=-1)
    for (b, n), logprob, values, places in zip(asked, chosen, top.values.tolist(), top.indices.tolist(), strict=True):
        out[b] = TokenLogprob(ids[b], logprob, tuple(zip(places[:n], values[:n], strict=True)))
    return out
