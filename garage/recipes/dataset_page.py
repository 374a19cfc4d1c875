"""Self-contained HTML pages about a dataset: its figures as plots, and its rows as coloured tokens."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

from jinja2 import Environment, StrictUndefined

from garage.data.validate import DatasetReport
from garage.recipes.page import Bar, columns


@dataclass(frozen=True)
class Token:
    """One token of a rendered row: its text, whether it is learned, masked (given, not learned), template, or cut, and if it is special."""

    text: str
    mark: str
    special: bool


def stats_page(report: DatasetReport, near_duplicates: int, max_length: int) -> str:
    """Figures and plots of a dataset."""
    lengths = [Bar(f"≤ {bound}", count, bound > max_length) for bound, count in report.lengths.histogram]
    share = [[Bar(name, share) for name, share in pairs] for pairs in (report.about.languages[:8], report.about.subjects)]
    charts = {"lengths": columns(lengths, "rows by length in tokens"), "languages": columns(share[0], "share of the rows by language")}
    return _render(title=report.path, report=report, near=near_duplicates, max_length=max_length, charts=charts, subjects=share[1], rows=())


def preview_page(rows: Sequence[Sequence[Token]], title: str, template_hash: str) -> str:
    """Rows as coloured tokens."""
    return _render(title=title, report=None, rows=rows, template_hash=template_hash)


def _render(**values: object) -> str:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string((files("garage") / "assets" / "dataset.html.j2").read_text(encoding="utf-8")).render(**values)
