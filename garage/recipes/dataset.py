"""`garage dataset validate|stats|preview`: what is in a dataset, and what a model would see and learn of it."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from rich.console import Console
from rich.text import Text

from garage.core.events import Listener
from garage.core.types import Row
from garage.data.dedup import deduplicate
from garage.data.encode import Encoding, encode_row
from garage.data.validate import DatasetReport, inspect
from garage.recipes.dataset_page import Token, preview_page, stats_page
from garage.recipes.sources import open_source
from garage.specs.datasets import PreviewSpec, StatsSpec, ValidateSpec
from garage.store.locate import locate
from garage.tokens.voice import Voice

STYLES = {"learned": "bold green", "masked": "dim", "template": "cyan", "cut": "red strike"}


@dataclass(frozen=True)
class Preview:
    """The first rows as tokens; `refused` says why a row cannot be rendered."""

    template_hash: str
    rows: tuple[tuple[Token, ...], ...]
    refused: tuple[str, ...]


@dataclass(frozen=True)
class Stats:
    """What `garage dataset stats` returns."""

    report: DatasetReport
    near_duplicates: int
    html: Path | None


def validate(spec: ValidateSpec, *_: Listener) -> DatasetReport:
    """Say which rows cannot be used and whether a run on the others may start.

    Raises:
        UserError: there is no such dataset, or its columns fit no known format.
    """
    report = _inspect(spec)
    print(_words(report))
    return report


def stats(spec: StatsSpec, *_: Listener) -> Stats:
    """Measure a dataset as `spec.model` would see it."""
    report = _inspect(spec)
    near = sum(reason.startswith("near") for _, reason in deduplicate(open_source(spec)))
    print(_words(report), _figures(report, near), sep="\n")
    if spec.html is not None:
        spec.html.write_text(stats_page(report, near, spec.max_length), encoding="utf-8")
        print(f"  the page: {spec.html}")
    return Stats(report, near, spec.html)


def preview(spec: PreviewSpec, *_: Listener) -> Preview:
    """Show the first rows token by token."""
    how = _encoding(spec, thinking=spec.thinking)
    rows = [(row, encode_row(row, how)[1]) for row in islice(open_source(spec), spec.rows)]
    refused = [reason for _, ledger in rows for reason in ledger.reasons]
    shown = tuple(_tokens(row, how) for row, ledger in rows if not ledger.refused)
    _print(shown, refused)
    if spec.html is not None:
        spec.html.write_text(preview_page(shown, spec.data, how.chat.hash), encoding="utf-8")
    return Preview(how.chat.hash, shown, tuple(refused))


def _encoding(spec: ValidateSpec, *, thinking: bool | None = None) -> Encoding:
    voice = Voice.load(locate(spec.model).newest)
    return Encoding(voice.tokenizer, voice.chat, spec.max_length, thinking=thinking)


def _inspect(spec: ValidateSpec) -> DatasetReport:
    how = _encoding(spec)
    return inspect(open_source(spec), measure=lambda row: encode_row(row, how)[1], max_length=spec.max_length)


def _tokens(row: Row, how: Encoding) -> tuple[Token, ...]:
    tokenizer = how.tokenizer
    if not row.messages:
        ids = [*how.begin, *tokenizer.encode(row.text), *tokenizer.eos_ids[:1]]
        marks = ["learned"] * len(ids)
    else:
        rendered = how.chat.render(row.messages, tools=row.tools, thinking=how.thinking)
        ids = list(rendered.ids)
        places = zip(rendered.learned, rendered.origins, strict=True)
        marks = ["learned" if learned else "template" if origin < 0 else "masked" for learned, origin in places]
        marks = [mark if place < how.max_length else "cut" for place, mark in enumerate(marks)]
    ends = {tokenizer.bos_id, *tokenizer.eos_ids, *how.chat.stop_ids}
    return tuple(Token(tokenizer.decode([i], skip_special=False), mark, i in ends) for i, mark in zip(ids, marks, strict=True))


def _print(rows: Sequence[tuple[Token, ...]], refused: Sequence[str]) -> None:
    console = Console(highlight=False, soft_wrap=True, file=sys.stdout)
    console.print("  ".join([*(f"[{style}]{mark}[/]" for mark, style in STYLES.items()), "[reverse]begin or end[/]"]))
    for tokens in rows:
        line = Text()
        for token in tokens:
            line.append(token.text, STYLES[token.mark] + (" reverse" if token.special else ""))
        console.print(line, "\n")
    for reason in refused:
        console.print(Text(f"cannot be rendered: {reason}", "red"))


def _words(report: DatasetReport) -> str:
    lines = [f"{report.path}: {report.rows} rows, format {report.format}, {report.duplicates} duplicates"]
    lines += [f"  line {fault.line}: {fault.message}" for fault in report.faults[:20]]
    lines += [f"  {finding.severity}: {finding.message}; {finding.remedy}" for finding in report.findings]
    return "\n".join(lines)


def _figures(report: DatasetReport, near: int) -> str:
    sizes, ledger, about = report.lengths, report.ledger, report.about
    lines = [f"  tokens a row: median {sizes.median}, 90 % up to {sizes.p90}, 99 % up to {sizes.p99}, longest {sizes.longest}"]
    top = max((count for _, count in sizes.histogram), default=1)
    lines += [f"  up to {bound:>6} {'#' * round(40 * count / top):<40} {count}" for bound, count in sizes.histogram]
    lines.append(f"  tokens: {ledger.tokens:,} kept, {ledger.learned:,} learned")
    lines.append(f"  cut: {ledger.cut_rows} rows by {ledger.cut_tokens:,} tokens, {ledger.cut_answer_tokens:,} of them of answers")
    lines.append(f"  near duplicates: {near}; variety {about.variety:.2f} (1 = no four words twice)")
    lines.append("  languages: " + ", ".join(f"{name} {share:.0%}" for name, share in about.languages[:6]))
    lines.append("  subjects: " + ", ".join(f"{name} {share:.0%}" for name, share in about.subjects[:12]))
    return "\n".join(lines)
