"""Structured output: which tokens may come next, so that the answer has the form that was asked for.

What: `Grammars` compiles structures (JSON Schema, regular expression, choices, Lark grammar) with llguidance and keeps the last ones;
`Constraint` is the place of one answer in its form. Nobody tells it what was kept or dropped: it is asked about a list of tokens and a
length, goes back over drafts that are no longer there, and forward over new ones. Its state is keyed by position, so preemption and
rejected drafts need no call. To verify drafts, write them to `sequence.tokens` and sample rows of rising length; after a draft that
breaks the form everything is allowed, because the row before never samples that draft.

End-of-sequence ids are allowed only where the form is complete; when nothing can follow it the answer is over by itself. Control tokens
are never part of an answer with a form. Between the parts of a JSON text stand at most 16 white space characters, so that none is
endless. In a regular expression the classes of digits and words are ASCII, as in JSON Schema.

Safety: a structure is a foreign program of at most 128 KB. llguidance bounds the size of grammars and the work of one token (a request
that exceeds it ends with an error), but some small schemas, `allOf` of patterns or `multipleOf` of a large prime, compile for minutes.
So every new structure compiles first in a process with 1 GB that is killed after two seconds: this file, which therefore loads
neither torch nor llguidance before they are needed. Compile on a thread that may wait.
"""

import json
import resource
import sys
import threading
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from garage.core.errors import UserError, needs_extra
from garage.core.types import Structure
from garage.core.worker import Worker

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

    from garage.tokens.tokenizer import Tokenizer

MAX_CHARS, MAX_KNOWN, MAX_DRAFTS = 1 << 17, 64, 64  # of one structure; structures kept; tokens at the end that may be taken back
SECONDS, CPU_SECONDS, MEMORY_BYTES = 2.0, 3, 1 << 30
WHITE_SPACE = r"[\x20\x0A\x0D\x09]{1,16}"  # between tokens of JSON: without a bound weak models write nothing else


class Constraint:
    """The form of one answer and how far the answer has come in it. Only the engine's thread uses it."""

    def __init__(self, matcher: "LLMatcher", num_prompt: int) -> None:
        self._matcher, self._num_prompt = matcher, num_prompt
        self._seen: list[int] = []

    def is_over(self, tokens: list[int], length: int) -> bool:
        """The answer `tokens[num_prompt:length]` is complete and nothing can follow it."""
        return self._follow(tokens, length) and self._matcher.is_stopped() and self._matcher.is_accepting()

    def write_mask(self, tokens: list[int], length: int, address: int, num_bytes: int) -> str:
        """Clear the bits of the tokens that may not stand at `length`. Returns what went wrong, "" if nothing did."""
        if self._follow(tokens, length):
            self._matcher.unsafe_compute_mask_ptr(address, num_bytes)
        return self._matcher.get_error().split("\n")[0]

    def _follow(self, tokens: list[int], length: int) -> bool:
        """Stand at `length`. False: the tokens before it break the form, and this stands where they begin to."""
        num_kept, new = changes(self._seen, tokens, self._num_prompt, length)
        if num_kept < len(self._seen):
            self._matcher.rollback(len(self._seen) - num_kept)
        num_taken = self._matcher.try_consume_tokens(new) if new else 0
        self._seen[num_kept:] = new[:num_taken]
        return num_taken == len(new)


class Grammars:
    """Compiled structures for one tokenizer. Any thread may call it."""

    def __init__(self, tokenizer: "Tokenizer", vocab_size: int, end_ids: Iterable[int]) -> None:
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._end_ids = sorted(i for i in end_ids if i < vocab_size)
        self._backend: LLTokenizer | None = None
        self._opening = threading.Lock()
        self._worker = Worker(Path(__file__), first={"kind": "regex", "text": "a"}, seconds=SECONDS)
        self._compiled = lru_cache(MAX_KNOWN)(self._compile)

    def start(self, structure: Structure, num_prompt: int) -> Constraint:
        """The constraint of a new answer.

        Raises:
            UserError: the structure is not well formed, too large, or not supported.
        """
        return Constraint(self._compiled(structure).deep_copy(), num_prompt)

    def _compile(self, structure: Structure) -> "LLMatcher":
        kind, text = structure.kind, structure.text
        if find_spec("llguidance") is None:
            raise needs_extra("llguidance", "server")
        if len(text) > MAX_CHARS:
            raise UserError(f"the {kind} of the structure has {len(text)} characters", remedy=f"use at most {MAX_CHARS}")
        if not self._end_ids:
            raise UserError("this model has no end-of-sequence token, so no answer could end", remedy="ask without a structure")
        try:
            answer = self._worker.ask({"kind": kind, "text": text})
        except TimeoutError as error:
            raise UserError(f"the {kind} of the structure is too much to compile: {error}", remedy="make it smaller") from error
        if "error" in answer:
            raise UserError(f"the {kind} of the structure is refused: {answer['error'][:500]}", remedy="correct or simplify it")
        with self._opening:
            self._backend = self._backend or self._open()
        return parser(self._backend, kind, text)

    def _open(self) -> "LLTokenizer":
        tokens = [self._tokenizer.token_bytes(i) for i in range(self._vocab_size)]
        specials = {i for i in self._tokenizer.special_ids if i < self._vocab_size} | set(self._end_ids)

        def write(text: str) -> list[int]:
            """Text the form forces, as the tokenizer writes it where that spells exactly this text."""
            ids = self._tokenizer.encode(text)
            is_same = all(i < len(tokens) for i in ids) and b"".join(tokens[i] for i in ids) == text.encode()
            return ids if is_same else backend.greedy_tokenize(text)

        backend = open_tokenizer(tokens, sorted(specials), self._end_ids, write)
        return backend


def changes(seen: list[int], tokens: list[int], start: int, length: int) -> tuple[int, list[int]]:
    """How many of the tokens `seen` still stand in `tokens[start:length]`, and what follows them. Only drafts can have changed."""
    high = min(len(seen), length - start)
    low = max(0, high - MAX_DRAFTS)
    while seen[low:high] != tokens[start + low : start + high]:
        high -= 1
    return high, tokens[start + high : length]


def open_tokenizer(tokens: Seq[bytes], special_ids: list[int], end_ids: list[int], write: Callable[[str], list[int]]) -> "LLTokenizer":
    """llguidance's view of a vocabulary, from what it asks of a tokenizer: bytes of tokens, control tokens, a way to write text."""
    from llguidance import LLTokenizer, TokenizerWrapper

    def vocabulary(text: str | bytes) -> list[int]:
        return write(text if isinstance(text, str) else text.decode())

    vars(vocabulary).update(tokens=tokens, special_token_ids=special_ids, eos_token_id=end_ids[0], bos_token_id=None)
    return LLTokenizer(TokenizerWrapper(vocabulary), eos_token=end_ids)


def parser(tokenizer: "LLTokenizer", kind: str, text: str) -> "LLMatcher":
    """The automaton of a structure.

    Raises:
        ValueError: it is not well formed, or asks for something llguidance cannot do.
    """
    from llguidance import LLMatcher, LLParserLimits, regex_to_lark

    if kind == "json":
        rules = LLMatcher.grammar_from_json_schema(text, defaults={"whitespace_pattern": WHITE_SPACE})
    elif kind == "grammar":
        rules = LLMatcher.grammar_from_lark(text)
    else:
        regex = _without_anchors(text) if kind == "regex" else _any_of(json.loads(text))
        rules = LLMatcher.grammar_from_lark(f"start: /{regex_to_lark(regex, 'dw')}/")
    limits = LLParserLimits(max_lexer_states=50_000, precompute_large_lexemes=False, verbose_errors=False)
    matcher = LLMatcher(tokenizer, rules, log_level=0, limits=limits)
    if matcher.is_error():
        raise ValueError(matcher.get_error())
    return matcher


def _without_anchors(regex: str) -> str:
    """The whole answer must match anyway."""
    body = regex.removeprefix("^")
    bare = body.removesuffix("$")
    return body if (len(bare) - len(bare.rstrip("\\"))) % 2 else bare


def _any_of(choices: object) -> str:
    if not isinstance(choices, list) or not choices or not all(isinstance(choice, str) for choice in choices):
        raise ValueError("choices are a list of one or more strings")
    return "|".join("".join(c if c.isascii() and c.isalnum() else f"\\x{{{ord(c):x}}}" for c in choice) for choice in choices)


def main() -> None:
    """Answer JSON lines (`core.worker`): does a structure compile and have a first token, and if not why."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    tokens = [b"", *(bytes([n]) for n in range(256))]
    bytewise = open_tokenizer(tokens, [0], [0], lambda text: [byte + 1 for byte in text.encode()])
    print('{"ready": true}', flush=True)
    for line in sys.stdin:
        used = resource.getrusage(resource.RUSAGE_SELF)
        resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + CPU_SECONDS, resource.RLIM_INFINITY))
        try:
            matcher = parser(bytewise, **json.loads(line))
            matcher.compute_bitmask()
            answer = {"error": "nothing has this form"} if matcher.is_stopped() and not matcher.is_accepting() else {}
        except ValueError as error:
            answer = {"error": str(error)}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
