"""When an answer ends, and which of its text may be shown already.

Five things end it, checked in this order for every token: an id in `stop_ids` (the model's end-of-sequence ids unless the request
ignores them, and the request's own), a form that is complete and that nothing can follow, a stop string, the token limit. The stop id
and the stop string are part of the text only with `include_stop`; the ids keep both. A stop string may lie across tokens and across
the bytes of one character, so the longest tail of the text that could still become one is held back until it does or cannot any
more. The one that is complete first ends the answer, so that it does not matter how the text is cut into tokens. None counts that is
complete within the first `min_tokens` tokens. An answer with a form always ends at an end-of-sequence id.

Without stop strings and without a reader the text is decoded once, at the end.
"""

from garage.core.types import FinishReason, Sampling, TokenLogprob
from garage.engine.request import Sequence
from garage.tokens.tokenizer import Detokenizer, Tokenizer


class Answer:
    """The text of one sequence as it grows."""

    def __init__(self, sequence: Sequence, tokenizer: Tokenizer, eos_ids: frozenset[int], *, is_read: bool) -> None:
        sampling = sequence.sampling
        self.sequence, self.is_read = sequence, is_read
        self.logprobs: list[TokenLogprob] = []
        self.finish_reason: FinishReason | None = None
        self._tokenizer = tokenizer
        self._stop_ids = stop_ids(sampling, eos_ids) if sequence.constraint is None else eos_ids | stop_ids(sampling, eos_ids)
        self._stops = tuple(stop for stop in sampling.stop if stop)
        self._detokenizer = Detokenizer(tokenizer, skip_special=sampling.skip_special) if is_read or self._stops else None
        self._held = ""
        self._shown: list[str] = []

    @property
    def token_ids(self) -> tuple[int, ...]:
        return tuple(self.sequence.tokens[self.sequence.num_prompt :])

    @property
    def text(self) -> str:
        """The whole text; complete once the answer is finished."""
        if self._detokenizer is not None:
            return "".join(self._shown)
        ids, sampling = self.token_ids, self.sequence.sampling
        is_cut = bool(ids) and ids[-1] in self._stop_ids and self.finish_reason == "stop" and not sampling.include_stop
        return self._tokenizer.decode(ids[:-1] if is_cut else ids, skip_special=sampling.skip_special)

    def add(self, token: int, logprob: TokenLogprob | None) -> str:
        """Take the next token; returns text that is safe to show. Sets `finish_reason` when it was the last."""
        tokens = self.sequence.tokens
        tokens.append(token)
        if logprob is not None:
            self.logprobs.append(logprob)
        is_stop, constraint = token in self._stop_ids, self.sequence.constraint
        if is_stop or (constraint is not None and constraint.is_over(tokens, len(tokens))):
            self.finish_reason = "stop"
        elif len(tokens) >= self.sequence.limit:
            self.finish_reason = "length"
        if self._detokenizer is None:
            return ""
        return self._show(self._detokenizer, () if is_stop and not self.sequence.sampling.include_stop else (token,))

    def rest(self) -> str:
        """Show what was held back, for an answer that ends from outside."""
        if self._detokenizer is None:
            return ""
        self._held += self._detokenizer.flush()
        return self._release(len(self._held))

    def _show(self, detokenizer: Detokenizer, new: tuple[int, ...]) -> str:
        seen = len(self._held)
        self._held += detokenizer.push(new)
        if self.finish_reason is not None:
            self._held += detokenizer.flush()
        if len(self._held) == seen and self.finish_reason is None:
            return ""
        sequence = self.sequence
        is_early = len(sequence.tokens) <= sequence.num_prompt + sequence.sampling.min_tokens
        found = None if is_early else first_stop(self._held, self._stops)
        if found is not None:
            self._held, self.finish_reason = self._held[: found[sequence.sampling.include_stop]], "stop"
        keep = 0 if self.finish_reason is not None else open_tail(self._held, self._stops)
        return self._release(len(self._held) - keep)

    def _release(self, count: int) -> str:
        text, self._held = self._held[:count], self._held[count:]
        if text:
            self._shown.append(text)
        return text


def stop_ids(sampling: Sampling, eos_ids: frozenset[int]) -> frozenset[int]:
    """The ids that end an answer."""
    return frozenset(sampling.stop_token_ids) | (frozenset() if sampling.ignore_eos else eos_ids)


def first_stop(text: str, stops: tuple[str, ...]) -> tuple[int, int] | None:
    """Where the stop string that is complete first begins and ends, or None."""
    found = [(place, place + len(stop)) for stop in stops if (place := text.find(stop)) >= 0]
    return min(found, key=lambda span: (span[1], span[0]), default=None)


def open_tail(text: str, stops: tuple[str, ...]) -> int:
    """Length of the longest end of `text` that is a proper beginning of a stop string."""
    longest = max((len(stop) for stop in stops), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return length
    return 0
