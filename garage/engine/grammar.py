"""A structure in llguidance's words, and the program of the process that tries it first.

What: `parser` makes the automaton of a structure; as a script this answers JSON lines (`core.worker`): does it compile, and if not why.
Why so: a structure is a foreign program. llguidance's own limits bound the size of grammars and the work of one token, but some small
schemas (`allOf` of patterns, `multipleOf` of a large prime) take minutes to compile, so every new one is compiled in a process that can
be killed before it is compiled in ours. It imports nothing of ours, for a quick start.
Limits: 1 GB of address space and 3 s of CPU per answer where the system enforces them. Regular expressions and grammars are llguidance's:
no backreferences, no look-around. Between the parts of a JSON text at most 40 white space characters may stand, so that none is endless.
"""

import json
import resource
import sys
from collections.abc import Callable, Sequence

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

MEMORY_BYTES, CPU_SECONDS = 1 << 30, 3
LIMITS = LLParserLimits(max_lexer_states=50_000, precompute_large_lexemes=False, verbose_errors=False)
WHITE_SPACE = r"[\x20\x0A\x0D\x09]{1,40}"


class Vocabulary:
    """What llguidance asks of a tokenizer: the bytes of every token, the control tokens, and a way to write forced text."""

    bos_token_id = None

    def __init__(self, tokens: Sequence[bytes], special_ids: Sequence[int], end_id: int, write: Callable[[str], list[int]]) -> None:
        self.tokens, self.special_token_ids, self.eos_token_id, self._write = tokens, special_ids, end_id, write

    def __call__(self, text: str | bytes) -> list[int]:
        if isinstance(text, bytes):
            raise TypeError("give text")  # llguidance asks whether bytes will do
        return self._write(text)


def open_tokenizer(vocabulary: Vocabulary, end_ids: Sequence[int]) -> LLTokenizer:
    return LLTokenizer(TokenizerWrapper(vocabulary), eos_token=list(end_ids))


def parser(tokenizer: LLTokenizer, kind: str, text: str) -> LLMatcher:
    """The automaton of a structure.

    Raises:
        ValueError: it is not well formed, or asks for something llguidance cannot do.
    """
    matcher = LLMatcher(tokenizer, _rules_of(kind, text), log_level=0, limits=LIMITS)
    if matcher.is_error():
        raise ValueError(matcher.get_error())
    return matcher


def _rules_of(kind: str, text: str) -> str:
    if kind == "json":
        return LLMatcher.grammar_from_json_schema(text, defaults={"whitespace_pattern": WHITE_SPACE})
    if kind == "regex":
        return LLMatcher.grammar_from_regex(_without_anchors(text))
    if kind == "grammar":
        return LLMatcher.grammar_from_lark(text)
    choices = json.loads(text)
    if not isinstance(choices, list) or not choices or not all(isinstance(choice, str) for choice in choices):
        raise ValueError("choices are a list of one or more strings")
    return LLMatcher.grammar_from_regex("|".join("".join(map(_literal, choice)) for choice in choices))


def _without_anchors(regex: str) -> str:
    """The whole answer must match anyway."""
    body = regex.removeprefix("^")
    bare = body.removesuffix("$")
    return body if (len(bare) - len(bare.rstrip("\\"))) % 2 else bare


def _literal(character: str) -> str:
    return character if character.isascii() and character.isalnum() else f"\\x{{{ord(character):x}}}"


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    tokens = [b"", *(bytes([n]) for n in range(256))]
    bytewise = open_tokenizer(Vocabulary(tokens, [0], 0, lambda text: [byte + 1 for byte in text.encode()]), [0])
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
