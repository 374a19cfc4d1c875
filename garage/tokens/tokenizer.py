"""A Hub tokenizer directory of any vintage, and streaming decode.

What: the few calls of the `tokenizers` library that the stages need. `encode` never adds BOS or EOS (the chat renderer owns them) and
reads control tokens in a text as text unless told otherwise, so that nobody can forge a turn.
Why so: BOS twice or never, and an EOS that ends nothing, are the commonest silent faults of fine-tuning. End ids are the union of what
the tokenizer, `generation_config.json` and `config.json` say, because each is the only place in some published model.
Limits: needs `tokenizer.json`; refuses files above 256 MB and tokenizers that cannot write a control token as text.
"""

import codecs
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, processors
from tokenizers import Tokenizer as Backend

from garage.core.errors import UserError
from garage.core.files import damaged, parse_object, read_file, read_object

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
         "chat_template.jinja", "chat_template.json")
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SHOWN = [*range(33, 127), *range(161, 173), *range(174, 256)]  # the byte-level alphabet of GPT-2: these bytes stand for themselves
_BYTE_OF = {chr(b): b for b in _SHOWN} | {chr(256 + n): b for n, b in enumerate(sorted(set(range(256)) - set(_SHOWN)))}


class Tokenizer:
    """Text to ids and back. `specials` maps control tokens to ids; `names` maps "bos_token", "eos_token", ... to their text."""

    def __init__(self, files: Mapping[str, bytes], *, where: str, more_eos: Iterable[int] = ()) -> None:
        self._files, self.where = dict(files), where
        raw = self._json("tokenizer.json")
        self._config = self._json("special_tokens_map.json") | self._json("tokenizer_config.json")
        self.hash = hashlib.blake2b(_canonical(raw), digest_size=16).hexdigest()
        named = {name: _text_of(self._config.get(name)) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
        self.names = {name: text for name, text in named.items() if text}
        self._backend, first, self.specials = self._open()
        self.special_ids = frozenset(self.specials.values())
        self.vocab_size: int = self._backend.get_vocab_size()
        ids = {name: self.token_to_id(text) for name, text in self.names.items()}
        self.bos_id, self.pad_id = ids.get("bos_token"), ids.get("pad_token")
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys(i for i in (ids.get("eos_token"), *more_eos) if i is not None))
        lost = [n for n in ("bos_token", "eos_token") if n in ids and ids[n] is None] + [i for i in self.eos_ids if i >= self.vocab_size]
        if lost:
            raise damaged(f"{where}/tokenizer_config.json", f"{lost} is not in the vocabulary of {self.vocab_size}")
        self.adds_bos = bool(self._config.get("add_bos_token", self.bos_id in first))
        decoder = raw.get("decoder") or {}
        steps = {str(d.get("type")) for d in decoder.get("decoders", [decoder])}
        self.is_byte_level = steps == {"ByteLevel"}
        self.is_sentencepiece = steps <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}

    @classmethod
    def load(cls, directory: Path) -> "Tokenizer":
        """Read the tokenizer files of a Hub directory.

        Raises:
            UserError: there is no `tokenizer.json`, or a file is damaged or too large.
        """
        files = {name: data for name in FILES if (data := read_file(directory / name)) is not None}
        if "tokenizer.json" not in files:
            raise UserError(f"{directory} has no tokenizer.json", remedy="load the tokenizer with transformers once and save it there")
        raws = [read_object(directory / name) for name in ("generation_config.json", "config.json")]
        try:
            ends = [end for raw in raws for place in (raw, raw.get("text_config") or {}) for end in _ids_of(place.get("eos_token_id"))]
            return cls(files, where=str(directory), more_eos=ends)
        except (TypeError, ValueError, KeyError, AttributeError) as error:  # valid JSON of the wrong shape
            raise damaged(f"the tokenizer configuration of {directory}", error) from error

    def save(self, directory: Path) -> None:
        """Write the tokenizer files as they were read."""
        directory.mkdir(parents=True, exist_ok=True)
        for name, data in self._files.items():
            (directory / name).write_bytes(data)

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Ids of a text, without BOS or EOS. With `allow_special`, control tokens written in the text become their ids."""
        return self.encode_spans(text, allow_special=allow_special)[0]

    def encode_spans(self, text: str, *, allow_special: bool = False) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and, for each, the range of characters of `text` it stands for."""
        try:
            out = self._backend.encode(text, add_special_tokens=False)
            if not allow_special and not self.special_ids.isdisjoint(out.ids):
                out = self._plain.encode(text, add_special_tokens=False)
        except (UnicodeError, TypeError) as error:
            raise UserError(f"the text is not valid Unicode: {text[:80]!r}", remedy="remove lone surrogates from it") from error
        if not allow_special and not self.special_ids.isdisjoint(out.ids):
            raise UserError(f"the tokenizer of {self.where} cannot write control tokens as text: {text[:80]!r}", remedy="remove them")
        return out.ids, out.offsets

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Text of ids; bytes that are not UTF-8 become U+FFFD."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special)

    def id_to_token(self, token_id: int) -> str:
        return self._backend.id_to_token(token_id) or ""

    def token_to_id(self, token: str) -> int | None:
        return self._backend.token_to_id(token)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for, its leading space included."""
        token = self.id_to_token(token_id)
        if self.is_byte_level:
            return bytes(_BYTE_OF[c] for c in token) if _BYTE_OF.keys() >= set(token) else token.encode()
        byte = _BYTE.fullmatch(token)
        return bytes([int(byte[1], 16)]) if byte else token.replace("▁", " ").encode()

    @cached_property
    def _plain(self) -> Backend:
        """A second copy that reads control tokens as text; made when first needed, never toggled: threads cannot disturb each other."""
        backend = self._open()[0]
        backend.encode_special_tokens = True
        return backend

    def _open(self) -> tuple[Backend, list[int], dict[str, int]]:
        """The library's tokenizer, the first id it gives to a text by itself, and the control tokens."""
        try:
            backend = Backend.from_str(self._files["tokenizer.json"].decode())
        except Exception as error:  # the library raises bare Exception for every fault of the file
            raise damaged(f"{self.where}/tokenizer.json", error) from error
        backend.no_truncation()
        backend.no_padding()
        for token_id, token in self._listed_tokens():
            if backend.token_to_id(token.content) is None:
                backend.add_tokens([token])
            if backend.token_to_id(token.content) != token_id:
                raise damaged(f"{self.where}/added_tokens.json", f"{token.content!r} has not the id {token_id}")
        more = self._config.get("additional_special_tokens") or self._config.get("extra_special_tokens") or []
        texts = [*self.names.values(), *map(_text_of, more.values() if isinstance(more, dict) else more)]
        texts += [t.content for _, t in self._listed_tokens() if t.special]
        backend.add_special_tokens([t for t in texts if t and backend.token_to_id(t) is not None])
        added = {t.content: i for i, t in sorted(backend.get_added_tokens_decoder().items()) if t.special or t.content in texts}
        first = backend.encode("a").ids[:1]
        backend.post_processor = processors.ByteLevel(trim_offsets=False)  # it adds nothing and keeps spaces in the offsets
        return backend, first, added

    def _listed_tokens(self) -> list[tuple[int, AddedToken]]:
        """Tokens that older directories list beside tokenizer.json, in the order of their ids."""
        listed = {int(i): {"content": text} for text, i in self._json("added_tokens.json").items()}
        listed |= {int(i): token for i, token in (self._config.get("added_tokens_decoder") or {}).items()}
        flags = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
        return [(i, AddedToken(**{f: token[f] for f in flags if f in token})) for i, token in sorted(listed.items())]

    def _json(self, name: str) -> dict[str, Any]:
        return parse_object(self._files.get(name, b"{}"), f"{self.where}/{name}")


class Detokenizer:
    """Streaming decode: `push` returns the text that later ids cannot change, `flush` the rest. Joined pieces equal `decode` of all ids.

    Byte-level tokenizers hold back at most three bytes. SentencePiece ones hold back a run of byte tokens, because one bad byte
    spoils its whole run, and decode the rest beside the token before it. Any other decoder may rewrite everything: it waits for `flush`.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._tokenizer, self._skipped = tokenizer, tokenizer.special_ids if skip_special else frozenset[int]()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._before: list[int] = []
        self._held: list[int] = []

    def push(self, ids: Iterable[int]) -> str:
        kept = [i for i in ids if i not in self._skipped]
        if self._tokenizer.is_byte_level:
            return self._utf8.decode(b"".join(map(self._tokenizer.token_bytes, kept)))
        self._held += kept
        words = [k for k, i in enumerate(self._held, 1) if not _BYTE.fullmatch(self._tokenizer.id_to_token(i))]
        return self._take(words[-1]) if words and self._tokenizer.is_sentencepiece else ""

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True) + self._take(len(self._held))

    def _take(self, count: int) -> str:
        taken, self._held = self._held[:count], self._held[count:]
        known = len(self._tokenizer.decode(self._before, skip_special=False))
        text = self._tokenizer.decode(self._before + taken, skip_special=False)[known:]
        self._before = taken[-1:] or self._before
        return text


def alternatives(texts: Iterable[str]) -> re.Pattern[str]:
    """A pattern that matches any of the texts, the longest first; nothing if there are none."""
    return re.compile("|".join(re.escape(t) for t in sorted(set(texts), key=len, reverse=True)) or r"(?!)")


def _text_of(token: object) -> str:
    """A special token is written as a string or, by older versions, as an object with `content`."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else ""


def _ids_of(value: object) -> list[int]:
    return [i for i in (value if isinstance(value, list) else [value]) if type(i) is int and i >= 0]


def _canonical(raw: dict[str, Any]) -> bytes:
    """tokenizer.json in one spelling: merges as pairs, sorted keys, without truncation and padding settings."""
    model = dict(raw.get("model") or {})
    model["merges"] = [m.split(" ", 1) if isinstance(m, str) else m for m in model.get("merges") or []]
    kept = {k: v for k, v in raw.items() if k not in ("truncation", "padding")} | {"model": model}
    return json.dumps(kept, sort_keys=True, separators=(",", ":")).encode()
