"""Structured output: which tokens may come next, so that the answer has the form that was asked for.

What: `Grammars` compiles structures (JSON Schema, regular expression, choices, Lark grammar) with llguidance and keeps the last ones;
`Constraint` is the place of one answer in its form. Nobody tells it what was kept or dropped: it is asked about a list of tokens and a
length, goes back over drafts that are no longer there, and forward over new ones. Its state is keyed by position, so preemption and
rejected drafts need no call. To verify drafted tokens, write them to `sequence.tokens` and sample rows of rising length.
Why so: masks come from the parser itself, token by token, because an answer that is only checked at its end is wrong too late.

The end-of-sequence ids are allowed only where the form is complete; when nothing can follow it the answer is over by itself. A draft that
breaks the form allows everything after it: those rows are dropped, because the row before never samples that draft.
Control tokens are never part of an answer with a form, however its grammar spells them.

Safety: a structure has at most 128 KB. It compiles first in a process with little memory that is killed after two seconds
(`engine.grammar`), then here; each mask has the bounded work of llguidance's limits, and a request that exceeds them ends with an error.
Limits: compiling for a first time takes milliseconds to seconds: do it on a thread that may wait, before the request is submitted.
"""

import threading
from collections import OrderedDict
from collections.abc import Iterable
from collections.abc import Sequence as Seq
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from garage.core.errors import UserError, needs_extra
from garage.core.types import Structure
from garage.core.worker import Worker
from garage.engine.request import Row, changes
from garage.tokens.tokenizer import Tokenizer

if TYPE_CHECKING:  # llguidance is loaded for the first structure: most engines never need it
    from llguidance import LLMatcher, LLTokenizer

MAX_CHARS, SECONDS, MAX_KNOWN = 1 << 17, 2.0, 64


class Constraint:
    """The form of one answer and how far the answer has come in it. Only the engine's thread uses it."""

    def __init__(self, matcher: "LLMatcher", num_prompt: int) -> None:
        self._matcher, self._num_prompt = matcher, num_prompt
        self._seen: list[int] = []

    def is_over(self, tokens: Seq[int], length: int) -> bool:
        """The answer `tokens[num_prompt:length]` is complete and nothing can follow it."""
        return self._follow(tokens, length) and self._matcher.is_stopped() and self._matcher.is_accepting()

    def write_mask(self, tokens: Seq[int], length: int, mask_W: Tensor) -> str:
        """Set the bits of the tokens that may stand at `length`, 32 to a word. Returns what went wrong, "" if nothing did."""
        if self._follow(tokens, length):
            self._matcher.unsafe_compute_mask_ptr(mask_W.data_ptr(), mask_W.numel() * mask_W.element_size())
        else:
            mask_W.fill_(-1)
        return self._matcher.get_error().split("\n")[0]

    def _follow(self, tokens: Seq[int], length: int) -> bool:
        """Stand at `length`. False: the tokens before it break the form, and this stands where they begin to."""
        num_kept, new = changes(self._seen, tokens, self._num_prompt, length)
        if num_kept < len(self._seen):
            self._matcher.rollback(len(self._seen) - num_kept)
            del self._seen[num_kept:]
        num_taken = self._matcher.try_consume_tokens(new) if new else 0
        self._seen += new[:num_taken]
        return num_taken == len(new)


class Grammars:
    """Compiled structures for one tokenizer. Any thread may call it."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_ids: Iterable[int]) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._end_ids = sorted(i for i in end_ids if i < vocab_size)
        self._known: OrderedDict[Structure, LLMatcher] = OrderedDict()
        self._looking, self._compiling = threading.Lock(), threading.Lock()
        self._backend: LLTokenizer | None = None
        self._worker = Worker(Path(__file__).with_name("grammar.py"), first={"kind": "regex", "text": "a"}, seconds=SECONDS)

    def start(self, structure: Structure, num_prompt: int) -> Constraint:
        """The constraint of a new answer.

        Raises:
            UserError: the structure is not well formed, too large, or not supported.
        """
        matcher = self._find(structure)
        if matcher is None:
            with self._compiling:
                matcher = self._find(structure) or self._compile(structure)
        return Constraint(matcher.deep_copy(), num_prompt)

    def _find(self, structure: Structure) -> "LLMatcher | None":
        with self._looking:
            if structure in self._known:
                self._known.move_to_end(structure)
            return self._known.get(structure)

    def _compile(self, structure: Structure) -> "LLMatcher":
        kind, text = structure.kind, structure.text
        if len(text) > MAX_CHARS:
            raise UserError(f"the {kind} of the structure has {len(text)} characters", remedy=f"use at most {MAX_CHARS}")
        if find_spec("llguidance") is None:
            raise needs_extra("llguidance", "server")
        from garage.engine import grammar

        if not self._end_ids:
            raise UserError("this model has no end-of-sequence token, so no answer could end", remedy="ask without a structure")
        try:
            answer = self._worker.ask({"kind": kind, "text": text})
        except TimeoutError as error:
            remedy = "make it smaller: fewer alternatives, no allOf of patterns, no multipleOf of large numbers"
            raise UserError(f"the {kind} of the structure cannot be compiled: {error}", remedy=remedy) from error
        if "error" in answer:
            raise UserError(f"the {kind} of the structure is refused: {answer['error'][:500]}", remedy="correct or simplify it")
        if self._backend is None:
            self._backend = self._open()
        matcher = grammar.parser(self._backend, kind, text)
        with self._looking:
            self._known[structure] = matcher
            while len(self._known) > MAX_KNOWN:
                self._known.popitem(last=False)
        return matcher

    def _open(self) -> "LLTokenizer":
        from garage.engine import grammar

        tokens = [self._tokenizer.token_bytes(i) for i in range(self._vocab_size)]
        specials = sorted({i for i in self._tokenizer.special_ids if i < self._vocab_size} | set(self._end_ids))

        def write(text: str) -> list[int]:
            """Text the form forces, as the tokenizer writes it where that spells exactly this text."""
            ids = self._tokenizer.encode(text)
            if all(i < len(tokens) for i in ids) and b"".join(tokens[i] for i in ids) == text.encode():
                return ids
            return backend.greedy_tokenize(text)

        backend = grammar.open_tokenizer(grammar.Vocabulary(tokens, specials, self._end_ids[0], write), self._end_ids)
        return backend


def apply_forms(x_RV: Tensor, rows: Seq[Row]) -> dict[int, str]:
    """Forbid, in place, what the forms of the answers do not allow. Returns the rows whose form has failed, and why."""
    held = [(r, s.tokens, length, s.constraint) for r, (s, length) in enumerate(rows) if s.constraint is not None]
    masks_HW = torch.empty(len(held), -(-x_RV.shape[1] // 32), dtype=torch.int32, pin_memory=x_RV.is_cuda)
    errors = [(r, form.write_mask(tokens, length, mask_W)) for (r, tokens, length, form), mask_W in zip(held, masks_HW, strict=True)]
    bits = torch.tensor([1 << n for n in range(8)], dtype=torch.uint8, device=x_RV.device)
    bytes_HB = masks_HW.to(x_RV.device, non_blocking=True).view(torch.uint8)
    for (r, *_), bytes_B in zip(held, bytes_HB, strict=True):
        x_RV[r].masked_fill_((bytes_B[:, None] & bits).eq(0).flatten()[: x_RV.shape[1]], -torch.inf)
    return {r: f"the form of the answer cannot be followed: {error}" for r, error in errors if error}
