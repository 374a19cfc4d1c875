"""What a person sees while a recipe runs: bars and lines on stderr, made from events alone.

On a terminal there is one live bar a stage; elsewhere (a file, CI) a plain line every few seconds, so that logs stay readable. `NO_COLOR`
is respected by rich itself. Nothing here changes what runs: a recipe without listeners does the same, in silence.
"""

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from garage.core.events import Event

QUIET_SECONDS = 5.0
BRIEF = frozenset({"evaluating", "saving"})
"""Stages too short to be worth a line; the log has them."""


class Terminal:
    """A listener that shows events on stderr."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._progress: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._told, self._name = 0.0, ""

    def __call__(self, event: Event) -> None:
        show = getattr(self, f"_show_{event['kind']}", None)
        if show is not None:
            show(event)

    def _show_stage(self, event: Event) -> None:
        if event["name"] in BRIEF:
            return
        if event.get("total") is None and not event.get("detail"):
            self.console.print(f"[dim]{_plain(event['name'])}[/]")
            return
        self._bar(str(event["name"]), event.get("step"), event.get("total"), str(event.get("detail") or ""))

    def _show_metric(self, event: Event) -> None:
        if "loss" not in event and "held_loss" not in event:
            return
        names = {"loss": "loss", "held_loss": "held-out loss", "tokens_per_second": "tok/s"}
        numbers = [(label, event.get(name)) for name, label in names.items()]
        detail = "  ".join(f"{label} {_short(value)}" for label, value in numbers if isinstance(value, int | float))
        self._bar("training", event.get("step"), event.get("total"), detail)

    def _show_warning(self, event: Event) -> None:
        self.console.print(f"[yellow]warning[/] {_plain(event['message'])}")
        if event.get("remedy"):
            self.console.print(f"  {_plain(event['remedy'])}")

    def _show_artifact(self, event: Event) -> None:
        self.console.print(f"[green]wrote[/] {_plain(event['path'])}  [dim]{_plain(event.get('detail') or '')}[/]")

    def _show_phase(self, event: Event) -> None:
        self.console.print(f"{event['name']:<12} {event['seconds']:>6} s  {event.get('detail') or ''}".rstrip(), markup=False)

    def _show_sample(self, event: Event) -> None:
        self.console.print("\n".join(f"  [dim]{name}[/] {_plain(value)}" for name, value in event.items() if name not in ("time", "kind")))

    def _show_state(self, event: Event) -> None:
        if event["state"] != "running":
            self.close()

    def _bar(self, name: str, step: object, total: object, detail: str) -> None:
        if not self.console.is_terminal:
            self._line(name, step, total, detail)
            return
        if self._progress is None:
            times = (TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[detail]}"))
            columns = (TextColumn("{task.description:<18}"), BarColumn(24), MofNCompleteColumn(), *times)
            self._progress = Progress(*columns, console=self.console)
            self._progress.start()
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, total=None, detail="")
        total_number = float(total) if isinstance(total, int | float) else None
        done = float(step) if isinstance(step, int | float) else None
        self._progress.update(self._tasks[name], completed=done, total=total_number, detail=detail)

    def _line(self, name: str, step: object, total: object, detail: str) -> None:
        is_edge = name != self._name or (total is not None and step in (0, total))
        if not is_edge and time.monotonic() - self._told < QUIET_SECONDS:
            return
        self._told, self._name = time.monotonic(), name
        count = f" {step}/{total}" if total is not None and step is not None else ""
        self.console.print(f"{name}{count}  {detail}".rstrip(), markup=False)

    def close(self) -> None:
        """Leave the bars as they are and give the terminal back."""
        if self._progress is not None:
            self._progress.stop()
            self._progress, self._tasks = None, {}


def _short(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _plain(value: object) -> str:
    """Text from outside, safe between rich's square brackets."""
    return str(value).replace("[", "\\[")
