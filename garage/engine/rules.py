"""What a request changes about its logits before anything is drawn: bias, penalties, tokens that may not come.

In this order, as vLLM applies them: logit bias is added; the repetition penalty divides positive logits and multiplies others of tokens
in the prompt or the answer; the frequency penalty is taken off for each time a token stands in the answer, the presence penalty
once; then everything but the allowed ids is forbidden, and the last token of each bad word whose beginning stands in the answer, and
until the answer has `min_tokens` whatever would end it. A bad word is forbidden as it is written and with a space before it.

Counts of the answer's tokens are kept from step to step and follow the tokens by position: they go back over drafts that are gone.
A step costs one dictionary access per new token, and one pass over the different tokens of the sequence on the device.
"""

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from math import isfinite

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from garage.core.errors import UserError
from garage.core.types import Sampling
from garage.engine.constrain import changes
from garage.engine.request import Row
from garage.tokens.tokenizer import Tokenizer

Ids = NDArray[np.int64]
Values = NDArray[np.float32]


class Tally:
    """How often each token stands in an answer; those of the prompt are in it too where `repetition` counts them."""

    def __init__(self, known: Iterable[int], num_prompt: int) -> None:
        self._slots = {token: slot for slot, token in enumerate(dict.fromkeys(known))}
        self._num_prompt, self._num_fixed = num_prompt, len(self._slots)
        self._ids, self._counts = np.fromiter(self._slots, np.int64), np.zeros(len(self._slots), np.float32)
        self._seen: list[int] = []

    def follow(self, s: Sampling, tokens: list[int], length: int) -> tuple[Ids, Values, Values]:
        """The different tokens before `length`, what divides the logit of each, and what is taken off it."""
        num_kept, new = changes(self._seen, tokens, self._num_prompt, length)
        for token in self._seen[num_kept:]:
            self._counts[self._slots[token]] -= 1
        for token in new:
            slot = self._slots.setdefault(token, len(self._slots))
            if slot == len(self._ids):
                self._ids, self._counts = (np.append(old, np.zeros(slot + 64, old.dtype)) for old in (self._ids, self._counts))
            self._ids[slot] = token
            self._counts[slot] += 1
        self._seen[num_kept:] = new
        counts = self._counts[: len(self._slots)]
        stands = counts > 0
        taken: Values = np.float32(s.frequency_penalty) * counts + np.where(stands, np.float32(s.presence_penalty), np.float32(0))
        stands[: self._num_fixed] = True
        return self._ids[: len(counts)], np.where(stands, np.float32(s.repetition_penalty), np.float32(1)), taken


@dataclass(frozen=True, slots=True)
class Rules:
    """The rules of one request."""

    bias: tuple[Ids, Values]
    tally: Tally | None
    allowed: Ids
    bad_words: tuple[tuple[int, ...], ...]
    end_ids: tuple[int, ...]
    num_prompt: int

    def forbidden(self, s: Sampling, tokens: Seq[int], length: int) -> Ids:
        """Tokens that may not stand at `length`, beside those that are never allowed."""
        ends = self.end_ids if length - self.num_prompt < s.min_tokens else ()
        starts = ((word, length - len(word) + 1) for word in self.bad_words)
        found = (word[-1] for word, at in starts if at >= self.num_prompt and tuple(tokens[at:length]) == word[:-1])
        return np.array([*ends, *found], np.int64)


def make_rules(s: Sampling, prompt: Seq[int], end_ids: Iterable[int], tokenizer: Tokenizer, vocab_size: int) -> Rules | None:
    """The rules of a request; None if it has none. `end_ids` are the ids that would end its answer.

    Raises:
        UserError: a number is not finite or out of its range, or an id is not in the vocabulary.
    """
    _check(s, vocab_size)
    is_counted = bool(s.presence_penalty or s.frequency_penalty or s.repetition_penalty != 1)
    if not (is_counted or s.logit_bias or s.allowed_token_ids or s.bad_words or s.min_tokens > 0):
        return None
    known = (i for i in prompt if i < vocab_size) if s.repetition_penalty != 1 else ()
    words = (tuple(tokenizer.encode(text)) for word in s.bad_words for text in (word, " " + word) if word)
    return Rules(
        bias=(np.array([i for i, _ in s.logit_bias], np.int64), np.array([b for _, b in s.logit_bias], np.float32)),
        tally=Tally(known, len(prompt)) if is_counted else None,
        allowed=np.unique(np.array(s.allowed_token_ids, np.int64)),
        bad_words=tuple(dict.fromkeys(filter(None, words))),
        end_ids=tuple(i for i in end_ids if i < vocab_size), num_prompt=len(prompt),
    )  # fmt: skip


def _check(s: Sampling, vocab_size: int) -> None:
    ids = {"logit_bias": [i for i, _ in s.logit_bias], "allowed_token_ids": s.allowed_token_ids, "stop_token_ids": s.stop_token_ids}
    for name, given in ids.items():
        wrong = next((i for i in given if not 0 <= i < vocab_size), None)
        if wrong is not None:
            raise UserError(f"{name} names token {wrong}, but the vocabulary has {vocab_size}", remedy="use ids of this model's tokenizer")
    names = ("temperature", "top_p", "min_p", "typical_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
    numbers = {name: (getattr(s, name),) for name in names} | {"logit_bias": tuple(bias for _, bias in s.logit_bias)}
    for name, values in numbers.items():
        if not all(map(isfinite, values)) or (name == "repetition_penalty" and s.repetition_penalty <= 0):
            raise UserError(f"{name} is {values}", remedy="give finite numbers; a repetition_penalty is above 0")


def apply_rules(x_RV: Tensor, rows: Seq[Row]) -> None:
    """Change the float32 logits of the rows that have rules, in place."""
    ruled = [(r, s, length, s.rules) for r, (s, length) in enumerate(rows) if s.rules is not None]
    if not ruled:
        return
    if biased := [(r, *rules.bias) for r, _, _, rules in ruled if len(rules.bias[0])]:
        at, ids, biases = zip(*biased, strict=True)
        x_RV.index_put_(_places(at, ids, x_RV), _flat(biases, x_RV), accumulate=True)
    if counted := [(r, *rules.tally.follow(s.sampling, s.tokens, length)) for r, s, length, rules in ruled if rules.tally is not None]:
        at, ids, divisors, taken = zip(*counted, strict=True)
        places, divisors_N = _places(at, ids, x_RV), _flat(divisors, x_RV)
        old_N = x_RV[places]
        x_RV[places] = torch.where(old_N > 0, old_N / divisors_N, old_N * divisors_N) - _flat(taken, x_RV)
    for r, _, _, rules in ruled:
        if len(rules.allowed):
            allowed_N = _flat([rules.allowed], x_RV)
            kept_N = x_RV[r, allowed_N]
            x_RV[r].fill_(-torch.inf)[allowed_N] = kept_N
    banned = [rules.forbidden(s.sampling, s.tokens, length) for _, s, length, rules in ruled]
    x_RV[_places([r for r, *_ in ruled], banned, x_RV)] = -torch.inf


def _places(rows: Seq[int], ids: Seq[Ids], x_RV: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of the rows and of the ids, flat."""
    return _flat([np.full(len(some), r) for r, some in zip(rows, ids, strict=True)], x_RV), _flat(ids, x_RV)


def _flat(pieces: Seq[NDArray[np.int64] | Values], x_RV: Tensor) -> Tensor:
    return put(np.concatenate(pieces), x_RV)


def hosted(values: Seq[float] | NDArray[np.generic], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """On the host, in pinned memory if `like` is on a GPU: a copy from there waits for nothing that the device does."""
    host = torch.as_tensor(values, dtype=dtype)
    return host.pin_memory() if like.is_cuda else host


def put(values: Seq[float] | NDArray[np.generic], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A copy on the device of `like`; nobody waits for it."""
    return hosted(values, like, dtype).to(like.device, non_blocking=True)
