"""Rows to the dataset artifact that training reads: split by document, rendered, tokenised, cut to length, and every loss counted.

A conversation goes through the one renderer (`tokens.chat`), which says which tokens are learned; a row longer than `max_length`
is cut at its end, and what was lost stands in the `Ledger`. A plain text becomes `bos? text eos`, all learned, in windows of `max_length`
that overlap by one token, so that every token is a target once and none is lost. A row that no longer has anything to learn is left
out and counted.

The split is by document, never by row: what one document taught must not be what another row of it is tested on.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from hashlib import blake2b
from pathlib import Path

import numpy as np

from garage.core.artifact import writing
from garage.core.errors import UserError
from garage.core.types import Message, Row
from garage.store.dataset import read_rows, write_encoded, write_rows
from garage.tokens.chat import Chat
from garage.tokens.tokenizer import Tokenizer

Piece = tuple[np.ndarray, np.ndarray]
Splits = Mapping[str, Iterable[Row]]


@dataclass(frozen=True)
class Encoding:
    """How rows become tokens. `system` is put before every conversation that has no system turn; `learn_all` is for pretraining.

    With `pairs` a row becomes two, its better and its worse answer; only these answers are learned, and a prompt that is too long is cut
    at its beginning.
    """

    tokenizer: Tokenizer
    chat: Chat
    max_length: int
    thinking: bool | None = None
    system: str = ""
    learn_all: bool = False
    pairs: bool = False

    @cached_property
    def begin(self) -> tuple[int, ...]:
        """The begin token, if this model's rows begin with one: its tokenizer says so, or its template writes it once, in front."""
        probe, bos = self.chat.render((Message("user", "Hello"),), add_generation_prompt=True).ids, self.tokenizer.bos_id
        return (bos,) if bos is not None and (self.tokenizer.adds_bos or (probe[0] == bos and probe.count(bos) == 1)) else ()


@dataclass(frozen=True)
class Ledger:
    """What became of the rows of one split. Answer tokens are the learned ones of conversations, before anything was cut."""

    rows: int = 0
    pieces: int = 0
    tokens: int = 0
    learned: int = 0
    refused: int = 0
    masked: int = 0
    cut_rows: int = 0
    cut_tokens: int = 0
    answer_tokens: int = 0
    cut_answer_tokens: int = 0
    ended: int = 0
    bos_missing: int = 0
    bos_doubled: int = 0
    longest: int = 0
    reasons: tuple[str, ...] = ()

    def __add__(self, other: "Ledger") -> "Ledger":
        sums = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        return Ledger(**sums | {"longest": max(self.longest, other.longest), "reasons": sums["reasons"][:5]})


@dataclass(frozen=True)
class Split:
    """Training and held-out rows, to be iterated as often as wanted; `dropped` training rows were copies of held-out ones."""

    train: Iterable[Row]
    eval: Iterable[Row]
    num_train: int
    num_eval: int
    dropped: int


def document_of(row: Row) -> str:
    """What a row was made from; rows of one document never stand on both sides of a split."""
    return row.meta.get("document") or row.source or row.id


def content_key(row: Row) -> int:
    """A hash of what the row says; equal for rows that differ in case and white space only."""
    turns = ["\x1f".join([m.role, m.content, m.reasoning, *(f"{c.name} {c.arguments}" for c in m.tool_calls)]) for m in row.messages]
    said = "\x1e".join([*turns, row.text, row.rejected])
    return _hash(re.sub(r"\s+", " ", said).strip().casefold())


def split_rows(rows: Iterable[Row], share: float, *, seed: int) -> Split:
    """Hold out about `share` of the rows: as many whole documents, in an order drawn from `seed`, as come nearest to it.

    With two documents or more, both sides get one. `rows` is iterated again whenever a side is; memory is 17 bytes a row.
    """
    assert iter(rows) is not rows, "rows must allow more than one pass"
    hashes = ((_hash(f"{seed}\x1f{document_of(row)}"), content_key(row)) for row in rows)
    keys = np.fromiter(hashes, dtype=[("document", "u8"), ("content", "u8")])
    documents, counts = np.unique(keys["document"], return_counts=True)
    is_held = np.zeros(len(keys), dtype=bool)
    if share > 0 and len(documents) > 1:
        nearest = np.abs(np.cumsum(counts)[:-1] - share * len(keys)).argmin()
        is_held = keys["document"] <= documents[nearest]
    is_copy = ~is_held & np.isin(keys["content"], keys["content"][is_held])
    is_train = ~is_held & ~is_copy
    return Split(_Chosen(rows, is_train), _Chosen(rows, is_held), int(is_train.sum()), int(is_held.sum()), int(is_copy.sum()))


def write_dataset(
    place: Path,
    splits: Splits,
    how: Encoding | None,
    *,
    parents: Sequence[str] = (),
    spec: Mapping[str, object] | None = None,
    facts: Mapping[str, object] | None = None,
) -> dict[str, Ledger]:
    """Write rows, and with `how` also their tokens, as a dataset artifact; returns the ledger of each split. `facts` join the manifest's.

    Raises:
        UserError: no row of a split that has rows could be encoded.
    """
    ledgers: dict[str, Ledger] = {}
    with writing(place, kind="dataset", parents=parents, spec=dict(spec or {})) as draft:
        draft.facts.update(facts or {})
        for split, rows in splits.items():
            count = write_rows(draft.path, split, rows)
            draft.facts[f"{split}_rows"] = count
            if how is not None:
                ledgers[split] = _write_tokens(draft.path, split, how)
        if how is not None:
            draft.facts.update(template_hash=how.chat.hash, tokenizer_hash=how.tokenizer.hash, max_length=how.max_length)
            draft.facts["ledger"] = {split: asdict(ledger) for split, ledger in ledgers.items()}
    return ledgers


def encode_row(row: Row, how: Encoding) -> tuple[list[Piece], Ledger]:
    """The token rows of one row (none if nothing of it can be learned) and its own ledger."""
    if not row.messages:
        return _encode_text(row, how)
    needs_system = how.system and row.messages[0].role not in ("system", "developer")
    messages = (Message("system", how.system), *row.messages) if needs_system else row.messages
    if how.pairs:
        return _encode_pair(replace(row, messages=messages), how)
    try:
        rendered = how.chat.render(messages, tools=row.tools, thinking=how.thinking)
    except UserError as error:
        return [], Ledger(rows=1, refused=1, reasons=(f"{row.source or row.id}: {error.args[0]}",))
    ids = np.array(rendered.ids, dtype=np.uint32)
    learned = np.ones(len(ids), np.uint8) if how.learn_all else np.array(rendered.learned, dtype=np.uint8)
    length = how.max_length
    piece, cut, lost = (ids[:length], learned[:length]), max(0, len(ids) - length), int(learned[length:].sum())
    ledger = Ledger(1, cut_rows=int(cut > 0), cut_tokens=cut, answer_tokens=int(learned.sum()), cut_answer_tokens=lost, longest=len(ids))
    return ([piece], ledger + _counted([piece], how)) if piece[1].any() else ([], ledger + Ledger(masked=1))


def _encode_pair(row: Row, how: Encoding) -> tuple[list[Piece], Ledger]:
    last, refused = row.messages[-1], Ledger(rows=1, refused=1)
    if last.role != "assistant" or not row.rejected or row.rejected == last.content:
        return [], refused + Ledger(reasons=(f"{row.source or row.id}: it has no better and worse answer to one prompt",))
    try:
        sides = [_last_answer((*row.messages[:-1], answer), row, how) for answer in (last, replace(last, content=row.rejected))]
    except UserError as error:
        return [], refused + Ledger(reasons=(f"{row.source or row.id}: {error.args[0]}",))
    kept = how.max_length - max(len(answer) for _, answer, _ in sides)
    if kept < len(how.begin) + 1:
        return [], refused + Ledger(reasons=(f"{row.source or row.id}: an answer is longer than max_length",))
    pieces, cut = list[Piece](), 0
    for prompt, answer, learned in sides:
        shown = prompt if len(prompt) <= kept else [*how.begin, *prompt[len(prompt) - kept + len(how.begin) :]]
        cut += len(prompt) - len(shown)
        flags = [0] * len(shown) + learned
        pieces.append((np.array(shown + answer, dtype=np.uint32), np.array(flags, dtype=np.uint8)))
    total, longest = sum(sum(learned) for _, _, learned in sides), max(len(prompt) + len(answer) for prompt, answer, _ in sides)
    return pieces, Ledger(1, cut_rows=int(cut > 0), cut_tokens=cut, answer_tokens=total, longest=longest) + _counted(pieces, how)


def _last_answer(messages: Sequence[Message], row: Row, how: Encoding) -> tuple[list[int], list[int], list[int]]:
    """The ids before the last message, those of it and after it, and which of these are learned."""
    rendered = how.chat.render(messages, tools=row.tools, thinking=how.thinking)
    start = rendered.origins.index(len(messages) - 1)
    return list(rendered.ids[:start]), list(rendered.ids[start:]), [int(flag) for flag in rendered.learned[start:]]


def _encode_text(row: Row, how: Encoding) -> tuple[list[Piece], Ledger]:
    ids = np.array([*how.begin, *how.tokenizer.encode(row.text), *how.tokenizer.eos_ids[:1]], dtype=np.uint32)
    if len(ids) < 2:
        return [], Ledger(rows=1, masked=1)
    windows = [ids[start : start + how.max_length] for start in range(0, len(ids) - 1, how.max_length - 1)]
    flags = [np.ones(len(window), dtype=np.uint8) for window in windows]
    for later in flags[1:]:
        later[0] = 0
    pieces = list(zip(windows, flags, strict=True))
    return pieces, Ledger(rows=1, longest=len(ids)) + _counted(pieces, how)


def _counted(pieces: Sequence[Piece], how: Encoding) -> Ledger:
    """Sizes of the token rows, and whether they begin and end as the model expects."""
    first, learned = pieces[0][0][:2].tolist(), [ids[flags > 0] for ids, flags in pieces]
    return Ledger(
        pieces=len(pieces), tokens=sum(len(ids) for ids, _ in pieces), learned=sum(map(len, learned)),
        ended=int(any(np.isin(ids, [*how.chat.stop_ids, *how.tokenizer.eos_ids]).any() for ids in learned)),
        bos_missing=int(bool(how.begin) and first[:1] != [*how.begin]), bos_doubled=int(first == [how.tokenizer.bos_id] * 2),
    )  # fmt: skip


def _write_tokens(place: Path, split: str, how: Encoding) -> Ledger:
    total = Ledger()

    def pieces() -> Iterator[Piece]:
        nonlocal total
        for row in read_rows(place, split):
            made, ledger = encode_row(row, how)
            total += ledger
            yield from made

    write_encoded(place, split, pieces())
    if total.rows and not total.pieces:
        why = total.reasons[0] if total.reasons else "nothing is left to learn within max_length"
        raise UserError(f"no row of the {split} split can be encoded; {why}", remedy="look at the rows with `garage dataset preview`")
    return total


@dataclass(frozen=True)
class _Chosen:
    """The rows whose flag is set; the flags are by position."""

    rows: Iterable[Row]
    flags: np.ndarray

    def __iter__(self) -> Iterator[Row]:
        return (row for row, chosen in zip(self.rows, self.flags, strict=True) if chosen)


def _hash(text: str) -> int:
    return int.from_bytes(blake2b(text.encode("utf-8", "replace"), digest_size=8).digest(), "big")
