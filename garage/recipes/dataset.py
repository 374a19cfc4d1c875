"""`garage dataset validate|stats|preview`: what is in a dataset, and what a model would see and learn of it."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from rich.console import Console
from rich.text import Text

from garage.core.events import Listener
from garage.core.types import Row
from garage.data.encode import Encoding, encode_row
from garage.data.read import read_dataset
from garage.data.validate import DatasetReport, inspect
from garage.specs.data import DatasetSpec
from garage.store.locate import locate
from garage.tokens.voice import Voice

STYLES = {"learned": "bold green", "masked": "dim", "template": "cyan", "cut": "red strike"}


@dataclass(frozen=True)
class Token:
    """One token of a rendered row: its text, and whether it is learned, masked (given, not learned), template, or cut."""

    text: str
    mark: str


@dataclass(frozen=True)
class Preview:
    """The first rows as tokens."""

    template_hash: str
    rows: tuple[tuple[Token, ...], ...]


def dataset(spec: DatasetSpec, *_: Listener) -> DatasetReport | Preview:
    """Look at a dataset as `spec.model` would.

    Raises:
        UserError: there is no such dataset, or its columns fit no known format.
    """
    voice = Voice.load(locate(spec.model).newest)
    how = Encoding(voice.tokenizer, voice.chat, spec.max_length)
    reading = read_dataset(spec.data)
    if spec.action == "preview":
        shown = tuple(_tokens(row, how) for row in islice(reading, spec.rows))
        _print(shown)
        return Preview(voice.chat.hash, shown)
    report = inspect(reading, length=lambda row: _length(row, how), max_length=spec.max_length)
    print(_words(report, is_short=spec.action == "validate"))
    return report


def _length(row: Row, how: Encoding) -> int:
    return encode_row(row, how)[1].longest


def _tokens(row: Row, how: Encoding) -> tuple[Token, ...]:
    tokenizer = how.tokenizer
    if not row.messages:
        return tuple(Token(_spelt(how, i), "learned") for i in [*tokenizer.encode(row.text), *tokenizer.eos_ids[:1]])
    rendered = how.chat.render(row.messages, tools=row.tools, thinking=how.thinking)
    places = zip(rendered.learned, rendered.origins, strict=True)
    marks = ["learned" if learned else "template" if origin < 0 else "masked" for learned, origin in places]
    marks = [mark if place < how.max_length else "cut" for place, mark in enumerate(marks)]
    return tuple(Token(_spelt(how, i), mark) for i, mark in zip(rendered.ids, marks, strict=True))


def _spelt(how: Encoding, token_id: int) -> str:
    return how.tokenizer.decode([token_id], skip_special=False)


def _print(rows: Sequence[tuple[Token, ...]]) -> None:
    console = Console(highlight=False, soft_wrap=True, file=sys.stdout)
    console.print("  ".join(f"[{style}]{mark}[/]" for mark, style in STYLES.items()))
    for tokens in rows:
        line = Text()
        for token in tokens:
            line.append(token.text, STYLES[token.mark])
        console.print(line, "\n")


def _words(report: DatasetReport, *, is_short: bool) -> str:
    lines = [f"{report.path}: {report.rows} rows, format {report.format}, {report.duplicates} duplicates"]
    lines += [f"  line {fault.line}: {fault.message}" for fault in report.faults[:20]]
    if not is_short:
        sizes = report.lengths
        lines.append(f"  tokens a row: median {sizes.median}, 90 % up to {sizes.p90}, 99 % up to {sizes.p99}, longest {sizes.longest}")
        top = max((count for _, count in sizes.histogram), default=1)
        lines += [f"  up to {bound:>6} {'#' * round(40 * count / top):<40} {count}" for bound, count in sizes.histogram]
    lines += [f"  {finding.severity}: {finding.message}; {finding.remedy}" for finding in report.findings]
    return "\n".join(lines)
