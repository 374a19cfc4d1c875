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
from itertools import chain
from math import isfinite

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from garage.core.errors import UserError
from garage.core.types import Sampling
from garage.engine.request import Row, changes
from garage.tokens.tokenizer import Tokenizer

Ids = NDArray[np.int64]
Values = NDArray[np.float32]


class Tally:
    """How often each token stands in an answer; those of the prompt are in it too where `repetition` counts them."""

    def __init__(self, prompt: Iterable[int], num_prompt: int, sampling: Sampling) -> None:
        self._sampling, self._num_prompt = sampling, num_prompt
        known = np.unique(np.fromiter(prompt, np.int64))
        self._num_fixed = self._size = len(known)
        self._slots: dict[int, int] = {token: slot for slot, token in enumerate(known.tolist())}
        self._ids, self._counts = np.resize(known, self._size + 64), np.zeros(self._size + 64, np.float32)
        self._seen: list[int] = []

    def follow(self, tokens: Seq[int], length: int) -> tuple[Ids, Values, Values]:
        """The different tokens before `length`, what divides the logit of each, and what is taken off it."""
        num_kept, new = changes(self._seen, tokens, self._num_prompt, length)
        for token in self._seen[num_kept:]:
            self._counts[self._slots[token]] -= 1
        for token in new:
            self._counts[self._slot(token)] += 1
        self._seen[num_kept:] = new
        s, counts = self._sampling, self._counts[: self._size]
        stands = counts > 0
        taken = s.frequency_penalty * counts + s.presence_penalty * stands
        stands[: self._num_fixed] = True
        divisors = np.where(stands, np.float32(s.repetition_penalty), np.float32(1))
        return self._ids[: self._size], divisors, taken

    def _slot(self, token: int) -> int:
        slot = self._slots.setdefault(token, self._size)
        if slot == self._size:
            if slot == len(self._ids):
                self._ids, self._counts = np.resize(self._ids, 2 * slot), np.append(self._counts, np.zeros(slot, np.float32))
            self._ids[slot], self._size = token, slot + 1
        return slot


@dataclass(frozen=True, slots=True)
class Rules:
    """The rules of one request."""

    bias: tuple[Ids, Values]
    tally: Tally | None
    allowed: Ids
    bad_words: tuple[tuple[int, ...], ...]
    end_ids: tuple[int, ...]
    min_length: int
    num_prompt: int

    def forbidden(self, tokens: Seq[int], length: int) -> list[int]:
        """Tokens that may not stand at `length`, beside those that are never allowed."""
        ends = self.end_ids if length < self.min_length else ()
        starts = ((word, length - len(word) + 1) for word in self.bad_words)
        return [*ends, *(word[-1] for word, at in starts if at >= self.num_prompt and tuple(tokens[at:length]) == word[:-1])]


def make_rules(sampling: Sampling, prompt: Seq[int], end_ids: Iterable[int], tokenizer: Tokenizer, vocab_size: int) -> Rules | None:
    """The rules of a request; None if it has none. `end_ids` are the ids that would end its answer.

    Raises:
        UserError: a number is not finite or out of its range, or an id is not in the vocabulary.
    """
    _check(sampling, vocab_size)
    s, num_prompt = sampling, len(prompt)
    is_counted = bool(s.presence_penalty or s.frequency_penalty or s.repetition_penalty != 1)
    if not (is_counted or s.logit_bias or s.allowed_token_ids or s.bad_words or s.min_tokens):
        return None
    known = (i for i in prompt if i < vocab_size) if s.repetition_penalty != 1 else ()
    words = chain.from_iterable((word, " " + word) for word in s.bad_words)
    return Rules(
        bias=(np.array([i for i, _ in s.logit_bias], np.int64), np.array([b for _, b in s.logit_bias], np.float32)),
        tally=Tally(known, num_prompt, s) if is_counted else None,
        allowed=np.array(sorted(set(s.allowed_token_ids)), np.int64),
        bad_words=tuple(dict.fromkeys(ids for word in words if (ids := tuple(tokenizer.encode(word))))),
        end_ids=tuple(i for i in end_ids if i < vocab_size),
        min_length=num_prompt + s.min_tokens, num_prompt=num_prompt,
    )  # fmt: skip


def _check(s: Sampling, vocab_size: int) -> None:
    ids = {"logit_bias": [i for i, _ in s.logit_bias], "allowed_token_ids": s.allowed_token_ids, "stop_token_ids": s.stop_token_ids}
    for name, given in ids.items():
        wrong = next((i for i in given if not 0 <= i < vocab_size), None)
        if wrong is not None:
            raise UserError(f"{name} names token {wrong}, but the vocabulary has {vocab_size}", remedy="use ids of this model's tokenizer")
    names = ("temperature", "top_p", "min_p", "typical_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
    numbers = {name: [getattr(s, name)] for name in names} | {"logit_bias": [bias for _, bias in s.logit_bias]}
    lowest = {"temperature": 0.0, "top_p": 0.0, "min_p": 0.0, "typical_p": 0.0, "repetition_penalty": 1e-3}
    for name, values in numbers.items():
        bad = next((v for v in values if not isfinite(v) or v < lowest.get(name, -1e4) or v > 1e4), None)
        if bad is not None:
            raise UserError(f"{name} is {bad}", remedy="give a finite number in its range")


def apply_rules(x_RV: Tensor, rows: Seq[Row]) -> None:
    """Change the float32 logits of the rows that have rules, in place."""
    ruled = [(r, s, s.rules, length) for r, (s, length) in enumerate(rows) if s.rules is not None]
    biased = [(r, rules.bias) for r, _, rules, _ in ruled if len(rules.bias[0])]
    if biased:
        places = _places([(r, ids) for r, (ids, _) in biased], x_RV.device)
        x_RV.index_put_(places, _tensor([values for _, (_, values) in biased], x_RV.device), accumulate=True)
    counted = [(r, rules.tally.follow(s.tokens, length)) for r, s, rules, length in ruled if rules.tally is not None]
    if counted:
        places = _places([(r, ids) for r, (ids, _, _) in counted], x_RV.device)
        divisors, taken = (_tensor([found[part] for _, found in counted], x_RV.device) for part in (1, 2))
        old = x_RV[places]
        x_RV[places] = torch.where(old > 0, old / divisors, old * divisors) - taken
    for r, _, rules, _ in ruled:
        if len(rules.allowed):
            allowed = torch.from_numpy(rules.allowed).to(x_RV.device)
            kept = x_RV[r, allowed]
            x_RV[r].fill_(-torch.inf)[allowed] = kept
    banned = [(r, np.array(ids, np.int64)) for r, s, rules, length in ruled if (ids := rules.forbidden(s.tokens, length))]
    if banned:
        x_RV[_places(banned, x_RV.device)] = -torch.inf


def _places(pieces: Seq[tuple[int, Ids]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Indices of the rows and of the ids, flat."""
    rows = np.repeat([r for r, _ in pieces], [len(ids) for _, ids in pieces])
    return _tensor([rows], device), _tensor([ids for _, ids in pieces], device)


def _tensor(pieces: Seq[NDArray[np.int64] | Values], device: torch.device) -> Tensor:
    return torch.from_numpy(np.concatenate(pieces)).to(device, non_blocking=True)
