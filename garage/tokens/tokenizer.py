"""A Hub tokenizer directory of any vintage, and streaming decode.

What: wraps the `tokenizers` library behind the few calls the stages need. `encode` never adds BOS or EOS (the chat renderer owns
them) and never turns control tokens found in a text into their ids unless told to, so that user text cannot forge a turn.
Why so: BOS added twice or never, and EOS that is never an end, are the commonest silent faults of fine-tuning. End ids are the union
of what the tokenizer, `generation_config.json` and `config.json` say, because each is the only place in some published model.
Limits: needs `tokenizer.json`; files above 256 MB are refused. A tokenizer whose plain-text path still yields a control id is refused.
Source: Hub layout of transformers 5; incremental UTF-8 after Unicode 15, section 3.9 ("maximal subpart" replacement).
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

FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model", "chat_template.jinja",
         "chat_template.json")
MAX_BYTES = 256 * 1024 * 1024
_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token")
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class Tokenizer:
    """Text to ids and back. `specials` maps each control token to its id; `names` maps "bos_token", "eos_token", ... to their text."""

    def __init__(self, files: Mapping[str, bytes], *, where: str = "tokenizer", extra_eos: Iterable[int] = ()) -> None:
        self._files, self.where = dict(files), where
        raw = self._json("tokenizer.json")
        self.config = self._json("special_tokens_map.json") | self._json("tokenizer_config.json")
        self.hash = hashlib.blake2b(_canonical(raw), digest_size=16).hexdigest()
        self._backend = self._open()
        self.names = {name: text for name in _NAMES if (text := _text_of(self.config.get(name)))}
        self._mark_specials()
        self.vocab_size: int = self._backend.get_vocab_size(with_added_tokens=True)
        self.bos_id, self.pad_id = self._named_id("bos_token"), self._named_id("pad_token")
        ends = [self._named_id("eos_token"), *extra_eos]
        self.eos_ids: tuple[int, ...] = tuple(dict.fromkeys(self._checked(i) for i in ends if i is not None))
        first = self._backend.encode("a").ids[:1]
        self.adds_bos = bool(self.config.get("add_bos_token", self.bos_id is not None and first == [self.bos_id]))
        self._backend.post_processor = processors.ByteLevel(trim_offsets=False)  # we add no tokens, and want offsets that keep their spaces
        self.is_byte_level, self.is_byte_fallback = _decoder_kind(raw)

    @classmethod
    def load(cls, directory: Path) -> "Tokenizer":
        """Read the tokenizer files of a Hub directory.

        Raises:
            UserError: there is no `tokenizer.json`, or a file is damaged or too large.
        """
        files = {name: data for name in FILES if (data := read_file(directory / name)) is not None}
        if "tokenizer.json" not in files:
            raise UserError(f"{directory} has no tokenizer.json", remedy="load the tokenizer with transformers once and save it there with save_pretrained")
        ends: list[int] = []
        for name in ("generation_config.json", "config.json"):
            raw = read_json(directory / name)
            ends += _ids_of(raw.get("eos_token_id")) + _ids_of((raw.get("text_config") or {}).get("eos_token_id"))
        return cls(files, where=str(directory), extra_eos=ends)

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
        out = self._run(self._backend, text)
        if not allow_special and not self.special_ids.isdisjoint(out.ids):
            out = self._run(self._plain, text)
            if not self.special_ids.isdisjoint(out.ids):
                raise UserError(f"the tokenizer of {self.where} cannot write control tokens as plain text: {text[:80]!r}", remedy="remove them from the text")
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
            known = [_BYTE_OF.get(c) for c in token]
            return token.encode() if None in known else bytes(b for b in known if b is not None)
        byte = _BYTE.fullmatch(token) if self.is_byte_fallback else None
        return bytes([int(byte[1], 16)]) if byte else token.replace("▁", " ").encode()

    @cached_property
    def special_ids(self) -> frozenset[int]:
        return frozenset(self.specials.values())

    @cached_property
    def _plain(self) -> Backend:
        """A second copy that reads control tokens as text. Made when first needed, and never toggled, so threads cannot disturb each other."""
        backend = self._open()
        backend.add_special_tokens(list(self.specials))
        backend.post_processor = processors.ByteLevel(trim_offsets=False)
        backend.encode_special_tokens = True
        return backend

    def _json(self, name: str) -> dict[str, Any]:
        return _parse(self._files.get(name, b"{}"), self.where, name)

    def _run(self, backend: Backend, text: str) -> Any:
        try:
            return backend.encode(text, add_special_tokens=False)
        except (UnicodeError, TypeError) as error:
            raise UserError(f"the text is not valid Unicode: {text[:80]!r}", remedy="remove lone surrogates from it") from error

    def _open(self) -> Backend:
        try:
            backend = Backend.from_str(self._files["tokenizer.json"].decode("utf-8"))
        except Exception as error:  # the library raises bare Exception for every fault of the file
            raise _damaged(self.where, "tokenizer.json", error) from error
        backend.no_truncation()
        backend.no_padding()
        for token_id, token in self._listed_tokens():
            if backend.token_to_id(token.content) is None:
                backend.add_special_tokens([token]) if token.special else backend.add_tokens([token])
            if backend.token_to_id(token.content) != token_id:
                raise _damaged(self.where, "added tokens", f"{token.content!r} is listed as id {token_id} but is {backend.token_to_id(token.content)}")
        return backend

    def _listed_tokens(self) -> list[tuple[int, AddedToken]]:
        """Tokens that older directories list beside tokenizer.json, in the order of their ids."""
        listed = {int(i): (t if isinstance(t, dict) else {"content": t}) for i, t in (self.config.get("added_tokens_decoder") or {}).items()}
        for text, token_id in self._json("added_tokens.json").items():
            listed.setdefault(int(token_id), {"content": text})
        flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
        return [(i, AddedToken(t["content"], **{f: bool(t[f]) for f in flags if f in t})) for i, t in sorted(listed.items())]

    def _mark_specials(self) -> None:
        more = self.config.get("additional_special_tokens") or self.config.get("extra_special_tokens") or []
        named = [*self.names.values(), *(_text_of(t) for t in (more.values() if isinstance(more, dict) else more))]
        known = [t for t in named if t and self._backend.token_to_id(t) is not None]
        self._backend.add_special_tokens(known)
        added = {t.content: i for i, t in self._backend.get_added_tokens_decoder().items() if t.special or t.content in known}
        self.specials: dict[str, int] = dict(sorted(added.items(), key=lambda item: item[1]))

    def _named_id(self, name: str) -> int | None:
        text = self.names.get(name)
        token_id = self._backend.token_to_id(text) if text else None
        if text and token_id is None and name != "pad_token":
            raise _damaged(self.where, "tokenizer_config.json", f"{name} {text!r} is not in the vocabulary")
        return token_id

    def _checked(self, token_id: int) -> int:
        if not 0 <= token_id < self.vocab_size:
            raise _damaged(self.where, "eos_token_id", f"{token_id} is outside the vocabulary of {self.vocab_size}")
        return token_id


class Detokenizer:
    """Streaming decode: `push` returns the text that later ids cannot change, `flush` the rest. Joined pieces equal `decode` of all ids.

    Byte-level tokenizers hold back at most three bytes. SentencePiece ones hold back a run of byte tokens, because one bad byte
    spoils its whole run, and decode the rest beside the token before it. Any other decoder may rewrite everything: it waits for `flush`.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._tokenizer, self._skip = tokenizer, skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._before: list[int] = []
        self._held: list[int] = []

    def push(self, ids: Iterable[int]) -> str:
        kept = [i for i in ids if not (self._skip and i in self._tokenizer.special_ids)]
        if self._tokenizer.is_byte_level:
            return self._utf8.decode(b"".join(map(self._tokenizer.token_bytes, kept)))
        self._held += kept
        last = next((k for k in range(len(self._held), 0, -1) if self._is_final(self._held[k - 1])), 0)
        return self._take(last)

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True) + self._take(len(self._held))

    def _is_final(self, token_id: int) -> bool:
        return self._tokenizer.is_byte_fallback and not _BYTE.fullmatch(self._tokenizer.id_to_token(token_id))

    def _take(self, count: int) -> str:
        if not count:
            return ""
        taken, self._held = self._held[:count], self._held[count:]
        before = self._tokenizer.decode(self._before, skip_special=False)
        text = self._tokenizer.decode(self._before + taken, skip_special=False)[len(before):]
        self._before = taken[-1:]
        return text


def read_file(path: Path) -> bytes | None:
    """The bytes of a file, None where there is none."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path} has more than {MAX_BYTES:,} bytes", remedy="give a tokenizer of the usual size")
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}", remedy="check its permissions") from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file, empty where there is none."""
    return _parse(read_file(path) or b"{}", str(path.parent), path.name)


def _parse(data: bytes, where: str, name: str) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _damaged(where, name, error) from error
    if not isinstance(value, dict):
        raise _damaged(where, name, "it is not a JSON object")
    return value


def _damaged(where: str, name: str, why: object) -> UserError:
    return UserError(f"the tokenizer at {where} is damaged ({name}): {str(why)[:200]}", remedy="download or export it again")


def _text_of(token: object) -> str:
    """A special token is written as a string or, by older versions, as an object with `content`."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else ""


def _ids_of(value: object) -> list[int]:
    return [i for i in (value if isinstance(value, list) else [value]) if type(i) is int]


def _canonical(raw: dict[str, Any]) -> bytes:
    """tokenizer.json as bytes that do not depend on its vintage: merges as pairs, no truncation or padding settings, sorted keys."""
    model = dict(raw.get("model") or {})
    if isinstance(model.get("merges"), list):
        model["merges"] = [m.split(" ", 1) if isinstance(m, str) else m for m in model["merges"]]
    kept = {k: v for k, v in raw.items() if k not in ("truncation", "padding")} | {"model": model}
    return json.dumps(kept, sort_keys=True, separators=(",", ":")).encode()


def _decoder_kind(raw: dict[str, Any]) -> tuple[bool, bool]:
    """Whether the decoder is byte-level alone, and whether it is of the SentencePiece kind."""
    decoder = raw.get("decoder") or {}
    steps = [str(d.get("type")) for d in decoder.get("decoders", [decoder])]
    return steps == ["ByteLevel"], bool(steps) and set(steps) <= {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}


def _byte_of() -> dict[str, int]:
    """The byte-level alphabet: printable bytes stand for themselves, the others for U+0100 and following (GPT-2)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in shown]
    return {chr(b): b for b in shown} | {chr(256 + n): b for n, b in enumerate(hidden)}


_BYTE_OF = _byte_of()
