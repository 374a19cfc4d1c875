"""From logits to the next token, for all rows at once, in float32.

First what the request changes (`engine.rules`), then the form of the answer (`engine.constrain`). Greedy is the argmax, the first id
of equals. Otherwise, as vLLM orders it: temperature, then min-p, top-k, top-p, and last typical-p, each over what those before keep;
then one draw. Filters are thresholds, so that ties at the edge are all kept and the result does not depend on how a sort breaks them.
Typical-p (Meister et al., arXiv 2202.00666) keeps the tokens whose surprise is nearest to the entropy, until they hold that much.

Randomness is counter-based: the draw for the token at position p of a request with seed s is a hash of (s, p), whatever else is in
the batch and whether the request was preempted. The token is found by inverting the cumulative distribution in the order of ids
with that one number. (Rounding of the model's own products may still differ between batches by a few units in the last place.)

Ids at or beyond `vocab_size`, the tokenizer's, are never sampled: models pad their vocabulary.

Log-probabilities are those of the model before all of this, in nats, as vLLM reports them.

Nothing here waits for a device but `read`. Rows with rules or a form read `sequence.tokens`, so those must be known on the host; other
rows need only their length. On a CPU numpy finds maxima and edges, ten times as fast as torch.

Shape suffixes: R rows, V vocabulary, A rows with log-probabilities.
"""

import math
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from garage.core.types import Sampling, TokenLogprob
from garage.engine.request import Row
from garage.engine.rules import apply_rules, put
from garage.kernels import compiled

COLDEST = 1e-5  # lower temperatures are greedy; dividing by them overflows
NOT_FINITE = "the model's logits are not finite"
NOTHING_LEFT, NOT_FOLLOWED = "no token is left that the request allows", "the form of the answer cannot be followed"
GOLDEN = np.uint64(0x9E3779B97F4A7C15)
FIRST_LOOK, HALVINGS = 1024, 32
Masses = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Chosen:
    """One token id per row. Rows with `faults` have none: their ids mean nothing, and the text says why."""

    ids: list[int]
    logprobs: list[TokenLogprob | None]
    faults: Mapping[int, str]


class Picked(NamedTuple):
    """The largest logit of each row, and the token that was chosen."""

    best_R: Tensor
    ids_R: Tensor


class Sampled:
    """What was sampled, on its way to the host: `ids_R`, on the device of the logits, can feed the next step at once; `read` waits."""

    def __init__(self, ids_R: Tensor, are_well: Seq[Tensor], faults: Mapping[int, str], widths: Mapping[int, int], logp_AV: Tensor) -> None:
        """`are_well`: the model's own logits were finite; and some token was left to choose. `widths`: the rows whose log-probability is
        wanted, with that of so many likely tokens."""
        self.ids_R, self._faults, self._widths = ids_R, faults, widths
        sent = [torch.stack([ids_R, *(each.long() for each in are_well)])]
        if widths:
            top = logp_AV.topk(min(max(widths.values()), logp_AV.shape[1]), dim=-1)
            sent += (logp_AV.gather(1, ids_R[put(list(widths), ids_R), None])[:, 0], *top)
        self._sent = [each.to("cpu", non_blocking=True) if each.is_cuda else each for each in sent]
        self._event = torch.cuda.Event() if ids_R.is_cuda else None  # type: ignore[no-untyped-call]
        if self._event is not None:
            self._event.record()

    def read(self) -> Chosen:
        """The ids and log-probabilities. What the device was given after this step is not waited for."""
        if self._event is not None:
            self._event.synchronize()
        (ids, are_finite, are_found), *sent = (each.tolist() for each in self._sent)
        faults = {r: NOTHING_LEFT for r, is_found in enumerate(are_found) if not is_found} | dict(self._faults)
        faults |= {r: NOT_FINITE for r, is_finite in enumerate(are_finite) if not is_finite}
        logprobs: list[TokenLogprob | None] = [None] * len(ids)
        for (r, n), logp, values, places in zip(self._widths.items(), *sent, strict=True) if self._widths else ():
            logprobs[r] = TokenLogprob(ids[r], logp, tuple(zip(places[:n], values[:n], strict=True)))
        return Chosen(ids, logprobs, faults)


def sample(logits_RV: Tensor, rows: Seq[Row], vocab_size: int, picked: Picked | None = None) -> Sampled:
    """The next token of every row. A sequence may have several rows, one for each drafted token it must be compared with. `picked` is
    what `pick` gave for these rows, if it was asked."""
    logits_RV = logits_RV[:, :vocab_size]
    warm = [r for r, (s, _) in enumerate(rows) if s.sampling.temperature >= COLDEST]
    widths = {r: s.sampling.logprobs for r, (s, _) in enumerate(rows) if s.sampling.logprobs is not None}
    is_bound = any(s.rules is not None or s.constraint is not None for s, _ in rows)
    x_RV = logits_RV.float() if widths or is_bound or (picked is None and warm) else logits_RV
    logp_AV = x_RV[put(list(widths), x_RV)].log_softmax(dim=-1) if widths else x_RV
    best_R, ids_R = picked or _best(x_RV)
    is_finite_R, faults = best_R.isfinite(), {}
    if is_bound:
        x_RV = x_RV.clone() if x_RV is logits_RV else x_RV
        apply_rules(x_RV, rows)
        faults = apply_forms(x_RV, rows)
        best_R, ids_R = _best(x_RV)
    if warm and picked is None:
        places, drawn = put(warm, x_RV), [rows[r] for r in warm]
        heat_R = put([s.sampling.temperature for s, _ in drawn], x_RV)
        u_R = put(uniforms([s.seed for s, _ in drawn], [length for _, length in drawn]), x_RV)
        ids_R[places] = _draw(x_RV if len(warm) == len(rows) else x_RV[places], heat_R, u_R, drawn)
    return Sampled(ids_R, (is_finite_R, best_R > -torch.inf), faults, widths, logp_AV)


def heats(rows: Seq[Row]) -> NDArray[np.float64] | None:
    """The temperature of each row, 0 for greedy ones; None if something else decides too."""
    if any(s.rules is not None or s.constraint is not None or _is_limited(s.sampling) for s, _ in rows):
        return None
    return np.array([s.sampling.temperature if s.sampling.temperature >= COLDEST else 0.0 for s, _ in rows])


def pick(x_RV: Tensor, draws_R2: Tensor | None) -> Picked:
    """The choice where temperature alone decides: greedy, or with each row's temperature (0 is greedy) and number in [0, 1). The same work
    whatever the numbers are, so that it can be captured."""
    best_R, ids_R = _best(x_RV)
    if draws_R2 is None:
        return Picked(best_R, ids_R)
    heat_R, u_R = draws_R2.unbind(1)
    drawn_R = _draw(x_RV.float(), torch.where(heat_R > 0, heat_R, 1).float(), u_R.float())
    return Picked(best_R, torch.where(heat_R > 0, drawn_R, ids_R))


def apply_forms(x_RV: Tensor, rows: Seq[Row]) -> dict[int, str]:
    """Forbid, in place, what the forms of the answers do not allow. Returns the rows whose form has failed, and why."""
    held = [(r, s.tokens, length, s.constraint) for r, (s, length) in enumerate(rows) if s.constraint is not None]
    masks_HB = torch.full((len(held), -(-x_RV.shape[1] // 32) * 4), 255, dtype=torch.uint8)
    errors = {}
    for (r, tokens, length, form), mask_B in zip(held, masks_HB, strict=True):
        if error := form.write_mask(tokens, length, mask_B.data_ptr(), len(mask_B)):
            errors[r] = f"{NOT_FOLLOWED}: {error}"
    bits = put([1 << n for n in range(8)], x_RV, torch.uint8)
    for (r, *_), mask_B in zip(held, put(masks_HB.numpy(), x_RV), strict=True):
        x_RV[r].masked_fill_((mask_B[:, None] & bits).eq(0).flatten()[: x_RV.shape[1]], -torch.inf)
    return errors


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


def _best(x_RV: Tensor) -> tuple[Tensor, Tensor]:
    """The largest logit of each row and the first id that has it; NaN counts as largest."""
    if (ids_R := compiled.best(x_RV)) is None:
        ids_R = torch.from_numpy(x_RV.float().numpy().argmax(axis=-1)) if x_RV.is_cpu else x_RV.argmax(dim=-1)
    return x_RV.gather(1, ids_R[:, None])[:, 0], ids_R


def _draw(x_RV: Tensor, heat_R: Tensor, u_R: Tensor, rows: Seq[Row] = ()) -> Tensor:
    """`rows` are given where some may filter."""
    mass_RV = x_RV / heat_R.to(x_RV.dtype)[:, None]
    mass_RV.sub_(mass_RV.amax(dim=-1, keepdim=True)).exp_()
    _filter(mass_RV, [s.sampling for s, _ in rows])
    cumulative_RV = mass_RV.cumsum(dim=-1)
    total_R1 = cumulative_RV[:, -1:]
    target_R1 = u_R.to(x_RV.dtype)[:, None] * total_R1
    target_R1 = torch.minimum(target_R1, torch.nextafter(total_R1, torch.zeros_like(total_R1)))  # the product may round up to the total
    return torch.searchsorted(cumulative_RV, target_R1, right=True)[:, 0].clamp_(max=mass_RV.shape[1] - 1)


def _is_limited(s: Sampling) -> bool:
    return s.min_p > 0 or s.top_k > 0 or s.top_p < 1 or s.typical_p < 1


def _filter(mass_RV: Tensor, samplings: Seq[Sampling]) -> None:
    """Set what is filtered out to 0, in place; the largest mass of each row is 1."""
    limited = [r for r, s in enumerate(samplings) if _is_limited(s)]
    quick = [r for r in limited if mass_RV.is_cpu and samplings[r].typical_p >= 1]
    for r in quick:
        mass_V = mass_RV[r].numpy()
        np.multiply(mass_V, mass_V >= _floor(mass_V, samplings[r]), out=mass_V)
    if slow := [r for r in limited if r not in set(quick)]:
        places = put(slow, mass_RV)
        mass_RV[places] = _filtered(mass_RV[places], [samplings[r] for r in slow])


def _floor(mass_V: Masses, s: Sampling) -> float:
    """The smallest mass that min-p, top-k and top-p keep of one row. A look at the largest is mostly enough."""
    floor, width = s.min_p, len(mass_V)
    for size in (min(FIRST_LOOK, width), width):
        top_N = np.sort(np.partition(mass_V, width - size)[width - size :])[::-1]
        if s.top_k > size < width:
            continue
        if s.top_k > 0:
            floor = max(floor, float(top_N[min(s.top_k, size) - 1]))
        if s.top_p >= 1:
            break
        kept_N = top_N[top_N >= floor]
        total = (kept_N if len(kept_N) < size else np.multiply(mass_V, mass_V >= floor)).sum()
        place = int(kept_N.cumsum(dtype=np.float64).searchsorted(s.top_p * total))
        if place < len(kept_N):
            return float(kept_N[place])
    return floor


def _filtered(mass_RV: Tensor, samplings: Seq[Sampling]) -> Tensor:
    """What all filters leave of many rows, without a sort or a word from the device."""
    score_RV, kept_RV = mass_RV.log(), mass_RV * (mass_RV >= _column([s.min_p for s in samplings], mass_RV))
    if any(s.top_k > 0 for s in samplings):
        most_R1 = _column([s.top_k if s.top_k > 0 else math.inf for s in samplings], mass_RV)
        kept_RV = kept_RV * _is_best(score_RV, torch.ones_like(mass_RV), most_R1)
    for name in ("top_p", "typical_p"):
        shares = [getattr(s, name) for s in samplings]
        if min(shares) < 1:
            p_RV = kept_RV / kept_RV.sum(dim=-1, keepdim=True)
            if name == "typical_p":
                score_RV = -(torch.special.entr(p_RV).sum(dim=-1, keepdim=True) + p_RV.log()).abs()
            kept_RV = kept_RV * _is_best(score_RV, p_RV, _column([share if share < 1 else math.inf for share in shares], mass_RV))
    return kept_RV


def _is_best(score_RV: Tensor, mass_RV: Tensor, wanted_R1: Tensor) -> Tensor:
    """Each row's shortest list, best score first, that holds the wanted mass; to the resolution of float32."""
    high_R1 = score_RV.amax(dim=-1, keepdim=True)
    low_R1 = high_R1 - 200  # below that there is no mass
    for _ in range(HALVINGS):
        middle_R1 = (low_R1 + high_R1) / 2
        is_enough_R1 = (mass_RV * (score_RV >= middle_R1)).sum(dim=-1, keepdim=True) >= wanted_R1
        low_R1, high_R1 = torch.where(is_enough_R1, middle_R1, low_R1), torch.where(is_enough_R1, high_R1, middle_R1)
    return score_RV >= low_R1


def _column(values: Seq[float], like: Tensor) -> Tensor:
    return put(values, like, like.dtype)[:, None]
