"""From logits to the next token, for all rows at once, in float32.

Greedy is the argmax. Otherwise, as vLLM orders it: temperature, then min-p, top-k, top-p, then one draw. Filters are thresholds on
the logits, so that ties at the edge are all kept and the result does not depend on how a sort breaks them.

Randomness is counter-based: the draw for the token at position p of a request with seed s is a hash of (s, p), whatever else is in
the batch and whether the request was preempted. The token is found by inverting the cumulative distribution in the order of ids
with that one number. (Rounding of the model's own products may still differ between batches by a few units in the last place.)

Ids at or beyond `vocab_size`, the tokenizer's, are never sampled: models pad their vocabulary.

Log-probabilities are those of the model before temperature and filters, in nats, as vLLM reports them.
"""

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from garage.core.types import Sampling, TokenLogprob
from garage.engine.constrain import banned
from garage.engine.request import Row
from garage.engine.rules import apply_rules

COLDEST = 1e-5  # lower temperatures are greedy; dividing by them overflows
FIRST_LOOK = 1024  # candidates sorted before the whole vocabulary is
NOT_FINITE = "the model's logits are not finite"
NOTHING_LEFT = "no token is left that the request allows"
GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, slots=True)
class Chosen:
    """One token id per row. Rows with `faults` have none: their ids mean nothing, and the text says why."""

    ids: list[int]
    logprobs: list[TokenLogprob | None]
    faults: Mapping[int, str]


@dataclass(frozen=True, slots=True)
class Sampled:
    """What was sampled, still on the device of the logits: `ids_R` can feed the next step at once, `read` waits for it."""

    ids_R: Tensor
    is_finite_R: Tensor  # the model's own logits were
    is_found_R: Tensor  # and some token was left to choose
    reported: "Reported | None"
    faults: Mapping[int, str]

    def read(self) -> Chosen:
        """The ids and log-probabilities on the host."""
        ids, are_finite, are_found = torch.stack([self.ids_R, self.is_finite_R.long(), self.is_found_R.long()]).tolist()
        faults = {r: NOTHING_LEFT for r, is_found in enumerate(are_found) if not is_found} | dict(self.faults)
        faults |= {r: NOT_FINITE for r, is_finite in enumerate(are_finite) if not is_finite}
        logprobs: list[TokenLogprob | None] = [None] * len(ids)
        if self.reported is not None:
            for r, found in zip(self.reported.rows, self.reported.read(), strict=True):
                logprobs[r] = found
        return Chosen(ids, logprobs, faults)


@dataclass(frozen=True, slots=True)
class Reported:
    """Log-probabilities of the chosen tokens of some rows, and of the `widths` most likely ones; tensors until read."""

    rows: Seq[int]
    widths: Seq[int]
    ids_A: Tensor
    logprobs_A: Tensor
    top_AK: Tensor
    top_ids_AK: Tensor

    def read(self) -> list[TokenLogprob]:
        tops = zip(self.widths, self.top_ids_AK.tolist(), self.top_AK.tolist(), strict=True)
        chosen = zip(self.ids_A.tolist(), self.logprobs_A.tolist(), tops, strict=True)
        return [TokenLogprob(i, logprob, tuple(zip(ids[:n], values[:n], strict=True))) for i, logprob, (n, ids, values) in chosen]


def sample(logits_RV: Tensor, rows: Seq[Row], vocab_size: int) -> Sampled:
    """The next token of every row. A sequence may have several rows, one for each drafted token it must be compared with."""
    logits_RV = logits_RV[:, :vocab_size]
    warm = [r for r, (s, _) in enumerate(rows) if s.sampling.temperature >= COLDEST]
    asked = [r for r, (s, _) in enumerate(rows) if s.sampling.logprobs is not None]
    bound = [r for r, (s, _) in enumerate(rows) if s.rules is not None or s.constraint is not None]
    x_RV = logits_RV.float() if warm or asked or bound or logits_RV.is_cpu else logits_RV
    raw_AV = x_RV[asked]
    best_R, ids_R = _best(x_RV)
    is_finite_R, faults = best_R.isfinite(), {}
    if bound:
        x_RV = x_RV.clone() if x_RV is logits_RV else x_RV
        apply_rules(x_RV, rows)
        faults = _apply_forms(x_RV, rows)
        best_R, ids_R = _best(x_RV)
    if warm:
        places = torch.tensor(warm, device=x_RV.device)
        ids_R[places] = _draw(x_RV if len(warm) == len(rows) else x_RV[places], [rows[r] for r in warm])
    reported = report(raw_AV, ids_R[asked], asked, [n for s, _ in rows if (n := s.sampling.logprobs) is not None]) if asked else None
    return Sampled(ids_R, is_finite_R, best_R > -torch.inf, reported, faults)


def report(logits_AV: Tensor, ids_A: Tensor, rows: Seq[int], widths: Seq[int]) -> Reported:
    """Log-probabilities under float32 logits."""
    logp_AV = logits_AV.log_softmax(dim=-1)
    top = logp_AV.topk(min(max(widths), logp_AV.shape[1]), dim=-1)
    return Reported(rows, widths, ids_A, logp_AV.gather(1, ids_A[:, None])[:, 0], top.values, top.indices)


def _best(x_RV: Tensor) -> tuple[Tensor, Tensor]:
    """The largest logit of each row and the first id that has it; NaN counts as largest. (numpy is ten times as fast on a CPU.)"""
    if not x_RV.is_cpu:
        best = x_RV.max(dim=-1)
        return best.values, best.indices
    ids_R = torch.from_numpy(x_RV.numpy().argmax(axis=-1))
    return x_RV.gather(1, ids_R[:, None])[:, 0], ids_R


def _apply_forms(x_RV: Tensor, rows: Seq[Row]) -> dict[int, str]:
    """Forbid, in place, what the forms of the answers do not allow. Returns the rows whose form has failed, and why."""
    held = [(r, s, length) for r, (s, length) in enumerate(rows) if s.constraint is not None]
    if not held:
        return {}
    masks_HW = torch.empty(len(held), -(-x_RV.shape[1] // 32), dtype=torch.int32, pin_memory=x_RV.is_cuda)
    faults = {}
    for (r, s, length), mask_W in zip(held, masks_HW, strict=True):
        assert s.constraint is not None
        if error := s.constraint.write_mask(s.tokens, length, mask_W):
            faults[r] = f"the form of the answer cannot be followed: {error}"
    for (r, _, _), banned_V in zip(held, banned(masks_HW.to(x_RV.device, non_blocking=True), x_RV.shape[1]), strict=True):
        x_RV[r].masked_fill_(banned_V, -torch.inf)
    return faults


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
