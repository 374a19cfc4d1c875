"""What is read off a prompt itself: the log-probability of each of its tokens, and the mean of its last hidden states.

Both are gathered while the prompt is computed, piece by piece. Log-probabilities are the model's own, over the tokenizer's ids, as the
sampler's are; they are computed in pieces of at most `PIECE` logits, so that [T, V] never exists. The mean is over every token of the
prompt, after the last norm, summed in fp32 and scaled to length one.

What is found in the prefix cache has no hidden states, so a prompt is computed whole where it is read; if it is preempted, what was
read stays.

Shape suffixes: T tokens of a piece, D model width, V vocabulary.
"""

import math
from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from garage.core.types import TokenLogprob
from garage.models.layers import Model

PIECE = 1 << 24


class Reading:
    """Of one prompt: `num_top` likely tokens beside each (None: no log-probabilities), the mean if it is wanted."""

    def __init__(self, num_prompt: int, num_top: int | None, *, wants_mean: bool) -> None:
        self.num_read, self.is_broken = 0, False
        self.logprobs: list[TokenLogprob | None] = [] if num_top is None else [None]
        self._num_prompt, self._num_top, self._wants_mean = num_prompt, num_top, wants_mean
        self._sum_D: Tensor | None = None

    @property
    def is_done(self) -> bool:
        return self.num_read == self._num_prompt

    def take(self, model: Model, hidden_TD: Tensor, start: int, tokens: Seq[int], vocab_size: int) -> None:
        """The hidden states of the tokens from `start` on; what is known already, or belongs to the answer, is skipped."""
        first, last = self.num_read, min(start + len(hidden_TD), self._num_prompt)
        if first >= last:
            return
        assert start <= first, f"tokens {first} to {start} of a prompt were not read"
        hidden_TD = hidden_TD[first - start : last - start]
        self.num_read = last
        if self._wants_mean:
            sum_D = hidden_TD.sum(dim=0, dtype=torch.float32)
            self._sum_D = sum_D if self._sum_D is None else self._sum_D + sum_D
        if self._num_top is not None:
            following = tokens[first + 1 : min(last + 1, self._num_prompt)]
            size = max(1, PIECE // model.config.vocab_size)
            for at in range(0, len(following), size):
                self._score(model.logits(hidden_TD[at : at + size]).float(), following[at : at + size], vocab_size)

    def embedding(self) -> tuple[float, ...]:
        """The mean of the prompt, of length one; empty if it was not asked for."""
        if self._sum_D is None:
            return ()
        unit: list[float] = (self._sum_D / self._sum_D.norm()).tolist()
        self.is_broken |= not all(map(math.isfinite, unit))
        return tuple(unit)

    def _score(self, logits_TV: Tensor, following: Seq[int], vocab_size: int) -> None:
        """`following` are the tokens that came after each row, which may be one or none fewer than the rows."""
        logits_TV = logits_TV[: len(following)]
        known_TV = logits_TV[:, :vocab_size]
        scale_T1 = known_TV.logsumexp(dim=-1, keepdim=True)
        ids_T1 = torch.tensor(following, device=logits_TV.device)[:, None]
        chosen = (logits_TV.gather(1, ids_T1) - scale_T1)[:, 0].tolist()
        top = known_TV.topk(min(self._num_top or 0, vocab_size), dim=-1)
        values, places = (top.values - scale_T1).tolist(), top.indices.tolist()
        self.is_broken |= not all(map(math.isfinite, chosen))
        rows = zip(following, chosen, places, values, strict=True)
        self.logprobs += [TokenLogprob(i, logprob, tuple(zip(ids, tops, strict=True))) for i, logprob, ids, tops in rows]
