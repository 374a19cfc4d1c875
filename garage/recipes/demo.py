"""`garage demo`: the whole road on the embedded model and sample documents, offline, on a CPU, in minutes.

    documents -> corpus -> dataset -> base measured -> tuned by LoRA -> measured again -> exported and certified -> served -> a page

Every step is the verb a person would type, with a spec of its own, and leaves its artifact. A step whose artifact is there is not done
again, so `--resume` goes on wherever the demo was interrupted; training goes on from its last checkpoint.
"""

import json
import shutil
import time
import webbrowser
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

from garage.core.artifact import write_file
from garage.core.errors import UserError
from garage.core.events import EventLog, Listener, read_events
from garage.core.seeds import derive
from garage.evals.compare import Comparison, compare
from garage.recipes import page
from garage.recipes.evaluate import Measured, line_of, measure, measured, verdict_of
from garage.recipes.export import Exported, export
from garage.recipes.ingest import ingest
from garage.recipes.serve import ask_both
from garage.recipes.sft import sft
from garage.recipes.synthesize import synthesize
from garage.recipes.trained import Trained
from garage.specs.base import read_values
from garage.specs.data import IngestSpec, SynthesizeSpec
from garage.specs.evals import TaskSpec
from garage.specs.export import ExportSpec
from garage.specs.runs import DemoSpec
from garage.specs.train import SFTSpec
from garage.store.report import Report, read_report

MARK = "demo.json"
SAMPLES = 12


@dataclass(frozen=True)
class Done:
    """One step: what came of it, in words, and how long it took."""

    name: str
    detail: str
    seconds: float


@dataclass(frozen=True)
class Demonstrated:
    """What `garage demo` returns. `elsewhere` is the difference on questions about other things."""

    steps: tuple[Done, ...]
    base: Measured
    tuned: Measured
    difference: Comparison
    elsewhere: Comparison
    exports: tuple[Exported, ...]
    report: Path
    seconds: float


def demo(spec: DemoSpec, *listeners: Listener) -> Demonstrated:
    """Walk the road; write everything below `spec.out` and end with a page that shows it.

    Raises:
        UserError: `spec.out` holds something that is not a demo.
        KeyboardInterrupt: `--resume` goes on.
    """
    road = _Road(spec, listeners)
    try:
        road.walk()
    except KeyboardInterrupt:
        road.events.emit("warning", message="interrupted; nothing is lost", remedy=f"go on with: garage demo --resume --out {spec.out}")
        raise
    result = road.result()
    where = result.report.resolve().as_uri()
    print(f"{line_of(road.reports['base'])}\n{line_of(road.reports['tuned'])}\n{verdict_of(result.difference)}\nreport: {where}")
    if spec.open:
        webbrowser.open(where)
    return result


class _Road:
    """The steps in order, what each left behind, and the clock."""

    def __init__(self, spec: DemoSpec, listeners: tuple[Listener, ...]) -> None:
        self.spec, self.out, self.listeners = spec, spec.out, listeners
        self.events = EventLog(None, *listeners)
        _prepare_place(spec)
        self.steps = _remembered(spec.out)
        self.reports: dict[str, Report] = {}

    def walk(self) -> None:
        self.step("documents read", self.out / "corpus", self.read)
        self.step("dataset made", self.out / "dataset", self.make)
        self.step("base measured", self.out / "reports" / "base-elsewhere", lambda: self.ask("base", "nano"))
        self.step("tuned", self.out / "tuned" / "artifacts", self.tune)
        self.step("measured again", self.out / "reports" / "tuned-elsewhere", lambda: self.ask("tuned", str(self.out / "tuned")))
        self.step("exported, certified", self.out / "export" / "merged", self.export)
        self.step("served", self.out / "answers.json", self.serve)

    def step(self, name: str, leaves: Path, work: Callable[[], str]) -> None:
        """Do a step unless what it leaves behind is there; remember how long it took (since it was last resumed)."""
        if not (leaves.exists() and name in self.steps):
            began = time.monotonic()
            self.events.emit("stage", name=name)
            detail = work()
            self.steps[name] = Done(name, detail, round(time.monotonic() - began, 2))
            write_file(self.out / MARK, json.dumps({key: vars(done) for key, done in self.steps.items()}, indent=1) + "\n")
        done = self.steps[name]
        self.events.emit("sample", step=f"{done.name}: {done.detail} ({done.seconds:.1f} s)")

    def read(self) -> str:
        with as_file(files("garage") / "assets" / "examples" / "documents") as documents:
            found = ingest(IngestSpec(paths=(documents,), out=self.out / "corpus"), *self.listeners)
        return f"{found.documents} documents in {found.chunks} chunks, {found.tokens:,} tokens, {len(found.failed)} failed"

    def make(self) -> str:
        made = synthesize(SynthesizeSpec(corpus=self.out / "corpus", out=self.out / "dataset", seed=self.spec.seed), *self.listeners)
        return f"{made.rows} rows to learn, {made.eval_rows} to watch over it, {made.test_rows} questions in other words to test with"

    def ask(self, name: str, model: str) -> str:
        """The held-out questions, and questions the tuning is not about."""
        about = TaskSpec(task="custom", data=self.out / "dataset", max_tokens=64)
        self.reports[name] = measure(model, about, self.out / "reports" / name, self.events)
        with as_file(files("garage") / "assets" / "examples" / "elsewhere.jsonl") as items:
            elsewhere = TaskSpec(task="custom", data=items, max_tokens=64)
            self.reports[f"{name}-elsewhere"] = measure(model, elsewhere, self.out / "reports" / f"{name}-elsewhere", self.events)
        return f"{self.reports[name].accuracy:.1%} of {self.reports[name].n} questions right"

    def tune(self) -> str:
        place = self.out / "tuned"
        with as_file(files("garage") / "assets" / "examples") as examples:
            values = read_values(examples / "demo-sft.toml") | {"data": [self.out / "dataset", examples / "general.jsonl"], "out": place}
            spec = SFTSpec.parse(values | ({"resume": place} if (place / "spec.json").exists() else {}))
            trained = sft(spec, *self.listeners)
        assert isinstance(trained, Trained), "one set of rows"
        return f"{trained.final.steps} steps, {trained.tokens_per_second:,.0f} tokens/s, loss {trained.final.loss:.3f}"

    def export(self) -> str:
        run, made = str(self.out / "tuned"), []
        for form in ("adapter", "merged"):
            values = {"model": run, "out": self.out / "export" / form, "format": form, "reports": [self.out / "reports" / "tuned"]}
            made.append(export(ExportSpec.parse(values), *self.listeners))
        return ", ".join(f"{one.format} {one.bytes / 1e6:.1f} MB" for one in made)

    def serve(self) -> str:
        report = self.report("base")
        item = report.items[derive(self.spec.seed, "question") % len(report.items)]
        answers = ask_both("nano", str(self.out / "export" / "merged"), item.question, *self.listeners)
        kept = {"question": item.question, "expected": item.gold} | vars(answers)
        write_file(self.out / "answers.json", json.dumps(kept, indent=1, ensure_ascii=False) + "\n")
        return f"asked over HTTP: {item.question} Base: {_short(answers.base)} Tuned: {_short(answers.tuned)}"

    def report(self, name: str) -> Report:
        if name not in self.reports:
            self.reports[name] = read_report(self.out / "reports" / name)
        return self.reports[name]

    def result(self) -> Demonstrated:
        """Everything the steps left, read back from the disk, and the page about it."""
        base, tuned = self.report("base"), self.report("tuned")
        difference = compare(base, tuned)
        elsewhere = compare(self.report("base-elsewhere"), self.report("tuned-elsewhere"))
        exports = tuple(Exported.read(self.out / "export" / form) for form in ("adapter", "merged"))
        place = self.out / "report.html"
        write_file(place, page.render(self.page(difference, elsewhere, exports)))
        of = {name: measured(self.report(name), self.out / "reports" / name) for name in ("base", "tuned")}
        seconds = round(sum(done.seconds for done in self.steps.values()), 1)
        return Demonstrated(tuple(self.steps.values()), of["base"], of["tuned"], difference, elsewhere, exports, place, seconds)

    def page(self, difference: Comparison, elsewhere: Comparison, exports: tuple[Exported, ...]) -> page.Page:
        base, tuned = self.report("base"), self.report("tuned")
        metrics = [event for event in read_events(self.out / "tuned" / "events.jsonl") if event["kind"] == "metric"]
        # a resumed run repeats steps; the last of each counts
        events = list({(event["step"], "loss" in event): event for event in metrics}.values())
        lines = [page.ScoreLine(name, r.accuracy, *r.ci95, r.lenient, r.n) for name, r in (("base", base), ("tuned", tuned))]
        pairs = zip(base.items[:SAMPLES], tuned.items[:SAMPLES], strict=True)
        samples = [page.SampleLine(b.question, b.gold, b.output.strip(), t.output.strip(), b.strict, t.strict) for b, t in pairs]
        return page.Page(
            title="Garage demo",
            lead="Six documents of a small company became a dataset; nano, the embedded model, learned what they say.",
            verdict=f"On the documents: {verdict_of(difference)}. Elsewhere (other facts, other pages): {verdict_of(elsewhere)}.",
            footer="The test asks facts in words that training did not use. Same items, greedy decoding, one chat template throughout.",
            scores=lines,
            samples=samples,
            steps=[page.StepLine(done.name, done.detail, done.seconds) for done in self.steps.values()],
            exports=[page.ExportLine(made.format, str(made.path), made.bytes, made.words) for made in exports],
            losses=[(float(str(e["step"])), float(str(e["loss"]))) for e in events if "loss" in e],
            held_losses=[(float(str(e["step"])), float(str(e["held_loss"]))) for e in events if "held_loss" in e],
        )


def _prepare_place(spec: DemoSpec) -> None:
    """A fresh demo replaces an earlier one, and nothing else."""
    if spec.out.exists() and any(spec.out.iterdir()) and not (spec.out / MARK).exists():
        raise UserError(f"{spec.out} holds something that is not a demo", remedy="choose another --out")
    if spec.out.exists() and not spec.resume:
        shutil.rmtree(spec.out)
    spec.out.mkdir(parents=True, exist_ok=True)
    if not (spec.out / MARK).exists():
        write_file(spec.out / MARK, "{}\n")


def _remembered(out: Path) -> dict[str, Done]:
    try:
        return {name: Done(**raw) for name, raw in json.loads((out / MARK).read_text(encoding="utf-8")).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{out / MARK} is damaged: {error}", remedy="start the demo anew, without --resume") from error


def _short(text: str) -> str:
    line = " ".join(text.split())
    return f"“{line[:80]}{'…' if len(line) > 80 else ''}”"
