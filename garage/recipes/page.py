"""A self-contained HTML page about a base and a tuned model: no script, no request, readable in any browser for ever.

Charts are SVG drawn here (two shapes: a curve and bars with intervals); a plotting library would weigh 149 MB for them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

WIDTH, HEIGHT, LEFT, BOTTOM = 720, 240, 52, 30


@dataclass(frozen=True)
class ScoreLine:
    """One model's result; shares between 0 and 1."""

    name: str
    accuracy: float
    low: float
    high: float
    lenient: float
    n: int


@dataclass(frozen=True)
class SampleLine:
    """One question and both answers."""

    question: str
    gold: str
    base: str
    tuned: str
    base_right: bool
    tuned_right: bool


@dataclass(frozen=True)
class StepLine:
    """One step of the road."""

    name: str
    detail: str
    seconds: float


@dataclass(frozen=True)
class ExportLine:
    """One exported form."""

    format: str
    path: str
    bytes: int
    certificate: str


@dataclass(frozen=True)
class Page:
    """Everything the page shows."""

    title: str
    lead: str
    verdict: str
    footer: str
    scores: Sequence[ScoreLine]
    samples: Sequence[SampleLine]
    steps: Sequence[StepLine]
    exports: Sequence[ExportLine]
    losses: Sequence[tuple[float, float]]
    held_losses: Sequence[tuple[float, float]]


def render(page: Page) -> str:
    """The page as one HTML document."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((files("garage") / "assets" / "report.html.j2").read_text(encoding="utf-8"))
    charts = {"curve": curve(page.losses, page.held_losses), "bars": bars(page.scores), "percent": percent}
    return template.render(**vars(page), **charts)


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def curve(losses: Sequence[tuple[float, float]], held: Sequence[tuple[float, float]]) -> Markup:
    """Two lines over the same axes: (step, loss) of training and of held-out rows."""
    points = [*losses, *held]
    if not points:
        return Markup("<p>no steps were taken</p>")
    last = max(step for step, _ in points) or 1
    top = max(loss for _, loss in points) * 1.05 or 1

    def place(step: float, loss: float) -> tuple[float, float]:
        return LEFT + step / last * (WIDTH - LEFT - 10), (HEIGHT - BOTTOM) * (1 - loss / top)

    parts = [_axis(f"{top * share:.2f}", (HEIGHT - BOTTOM) * (1 - share)) for share in (0, 0.25, 0.5, 0.75)]
    parts.append(_line([place(*point) for point in losses], "var(--before)", 1.5))
    parts.append(_line([place(*point) for point in held], "var(--after)", 2.5))
    anchors = {0: "start", 0.5: "middle", 1: "end"}
    parts += [_text(place(last * share, 0)[0], HEIGHT - 8, f"{last * share:.0f}", anchor) for share, anchor in anchors.items()]
    return _svg(HEIGHT, parts, "training and held-out loss by step")


@dataclass(frozen=True)
class Bar:
    """A column of a histogram; `is_over` marks what lies beyond a limit."""

    name: str
    value: float
    is_over: bool = False


def columns(values: Sequence[Bar], label: str) -> Markup:
    """A histogram: a column for each value, its figure above, its name below."""
    parts, width, top = [], (WIDTH - 20) / max(1, len(values)), max((bar.value for bar in values), default=0) or 1
    for place, bar in enumerate(values):
        x, height = 10 + place * width, (HEIGHT - BOTTOM - 24) * bar.value / top
        y, colour = HEIGHT - BOTTOM - height, "var(--before)" if bar.is_over else "var(--after)"
        parts.append(f'<rect x="{x + 4:.1f}" y="{y:.1f}" width="{width - 8:.1f}" height="{height:.1f}" rx="3" fill="{colour}"/>')
        figure = f"{bar.value:,}" if isinstance(bar.value, int) else percent(bar.value)
        parts += [_text(x + width / 2, y - 6, figure, "middle"), _text(x + width / 2, HEIGHT - 10, bar.name, "middle")]
    return _svg(HEIGHT, parts, label)


def bars(scores: Sequence[ScoreLine]) -> Markup:
    """A bar for each model with its interval."""
    parts, scale, colours = [], WIDTH - 170, ("var(--before)", "var(--after)")
    for row, score in enumerate(scores):
        y, colour = 12 + 42 * row, colours[row % 2]
        parts.append(_text(0, y + 17, score.name, "start"))
        parts.append(f'<rect x="90" y="{y}" width="{scale * score.accuracy:.1f}" height="24" rx="3" fill="{colour}"/>')
        parts.append(_line([(90 + scale * score.low, y + 12), (90 + scale * score.high, y + 12)], "var(--ink)", 2))
        parts.append(_text(90 + scale * score.high + 8, y + 17, percent(score.accuracy), "start"))
    return _svg(12 + 42 * len(scores), parts, "share of right answers by model")


def _svg(height: int, parts: Sequence[str], label: str) -> Markup:
    return Markup(f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{label}">{"".join(parts)}</svg>')


def _line(points: Sequence[tuple[float, float]], colour: str, width: float) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}" stroke-linejoin="round"/>'


def _axis(label: str, y: float) -> str:
    rule = f'<line x1="{LEFT}" x2="{WIDTH - 10}" y1="{y:.1f}" y2="{y:.1f}" stroke="var(--line)"/>'
    return rule + _text(LEFT - 6, y + 4, label, "end")


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="12" fill="var(--soft)" text-anchor="{anchor}">{Markup.escape(text)}</text>'
