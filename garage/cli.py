"""The command line: verbs are spec classes, and what a verb does is one recipe.

Exit codes: 0 done, 1 failed, 2 the person's mistake, 130 interrupted. Progress goes to stderr; `--json` prints one JSON object as the
last line of stdout. A recipe is imported only when its verb runs, so that `garage --help` stays quick.
"""

import dataclasses
import importlib
import io
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from garage import __version__
from garage.core.errors import UserError
from garage.specs.base import Spec, merge, read_values
from garage.specs.options import Arguments, help_text, read_arguments, to_toml


@dataclass(frozen=True)
class Verb:
    """Where a verb's spec class and its recipe live, as module:name below `garage`, and what it does."""

    spec: str
    recipe: str
    about: str


VERBS = {
    "demo": Verb("specs.runs:DemoSpec", "recipes.demo:demo", "the whole road on the embedded model and sample documents"),
    "doctor": Verb("specs.runs:DoctorSpec", "recipes.doctor:doctor", "check this machine and this install"),
    "ingest": Verb("specs.data:IngestSpec", "recipes.ingest:ingest", "files and folders -> corpus"),
    "synthesize": Verb("specs.data:SynthesizeSpec", "recipes.synthesize:synthesize", "corpus or dataset -> dataset, by rules or a teacher"),
    "dataset validate": Verb("specs.datasets:ValidateSpec", "recipes.dataset:validate", "rows that cannot be used, and what stops a run"),
    "dataset stats": Verb("specs.datasets:StatsSpec", "recipes.dataset:stats", "lengths, copies, languages, subjects, what is cut"),
    "dataset preview": Verb("specs.datasets:PreviewSpec", "recipes.dataset:preview", "rows token by token: learned, masked, cut"),
    "dataset map": Verb("specs.datasets:MapSpec", "recipes.reshape:map_rows", "any dataset -> canonical rows"),
    "dataset split": Verb("specs.datasets:SplitSpec", "recipes.reshape:split", "hold out whole documents"),
    "dataset dedup": Verb("specs.curate:DedupSpec", "recipes.curate:dedup", "drop copies and near copies"),
    "dataset decontaminate": Verb("specs.curate:DecontaminateSpec", "recipes.curate:decontaminate", "drop rows that hold test questions"),
    "dataset curate": Verb("specs.curate:CurateSpec", "recipes.curate:curate", "keep the rows that are grounded and well rated"),
    "dataset edit": Verb("specs.datasets:EditSpec", "recipes.reshape:edit", "add, change, delete, rate rows: a new version"),
    "dataset export": Verb("specs.datasets:DatasetExportSpec", "recipes.reshape:export", "rows for other programs: JSONL, Parquet, Hub"),
    "dataset recommend": Verb("specs.datasets:RecommendSpec", "recipes.reshape:recommend", "public datasets by use"),
    "pretrain": Verb("specs.train:PretrainSpec", "recipes.pretrain:pretrain", "train a model from scratch"),
    "sft": Verb("specs.train:SFTSpec", "recipes.sft:sft", "fine-tune a model on conversations, whole or by LoRA"),
    "distill": Verb("specs.train:DistillSpec", "recipes.distill:distill", "tune a model on the probabilities of a larger one"),
    "dpo": Verb("specs.train:DPOSpec", "recipes.dpo:dpo", "tune a model on pairs of a better and a worse answer"),
    "adapters average": Verb("specs.adapters:AverageSpec", "recipes.adapters:average", "one adapter of several over one base"),
    "plan": Verb("specs.plan:PlanSpec", "recipes.plan:plan", "memory and time of a training or a server before it starts"),
    "evaluate": Verb("specs.evals:EvaluateSpec", "recipes.evaluate:evaluate", "measure a model on a task"),
    "compare": Verb("specs.evals:CompareSpec", "recipes.evaluate:compare", "measure two models on the same items, with significance"),
    "export": Verb("specs.export:ExportSpec", "recipes.export:export", "write, reload and certify a trained model"),
    "serve": Verb("specs.serve:ServeSpec", "recipes.serve:serve", "an OpenAI-compatible API"),
    "generate": Verb("specs.generate:GenerateSpec", "recipes.generate:generate", "answer every row of a file, resumable"),
    "chat": Verb("specs.generate:ChatSpec", "recipes.chat:chat", "talk to a model in the terminal"),
    "models list": Verb("specs.models:ModelsListSpec", "recipes.models:list_models", "the models that are here"),
    "models pull": Verb("specs.models:ModelsPullSpec", "recipes.models:pull", "a model from the Hub into its own cache"),
    "models rm": Verb("specs.models:ModelsRmSpec", "recipes.models:remove", "delete a model from the Hub's cache"),
    "runs": Verb("specs.runs:RunsSpec", "recipes.runs:runs", "list, show and follow runs"),
}
TOGETHER = ("pretrain", "sft", "dpo")
"""Verbs that may run in several processes."""
GROUPS = {name.split()[0] for name in VERBS if " " in name}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line; returns the exit code, unless the process is one of several: it ends here."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not _one_of_several():
        return _run(words)
    try:
        code = _run(words)
    except SystemExit as ended:
        code = int(ended.code or 0)
    except Exception:  # a defect of ours: Python's words, and our way out
        sys.excepthook(*sys.exc_info())
        code = 1
    _load("recipes.run:leave")(code)  # type: ignore[operator]
    return code


def _one_of_several() -> bool:
    return "RANK" in os.environ and os.environ.get("WORLD_SIZE") != "1"


def _run(words: list[str]) -> int:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a file name need not be UTF-8
    try:
        with _together(words):
            return _main(words)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


@contextmanager
def _together(words: list[str]) -> Iterator[None]:
    """Under torchrun the processes are one command: the first one speaks, and the first that fails says why."""
    if not _one_of_several():
        yield
        return
    with _load("recipes.run:joined")(), open(os.devnull, "w", encoding="utf-8") as nothing:  # type: ignore[attr-defined]
        if words and words[0] not in TOGETHER:
            raise UserError(f"{words[0]} runs in one process", remedy=f"use torchrun for {', '.join(TOGETHER)} only")
        with redirect_stdout(nothing) if os.environ["RANK"] != "0" else nullcontext():
            yield


def _main(words: list[str]) -> int:
    if not words or words[0] in ("--help", "-h", "help"):
        print(_overview())
        return 0
    if words[0] in ("--version", "version"):
        print(f"garage {__version__}")
        return 0
    if words[0] in GROUPS and words[1:] in ([], ["--help"], ["-h"]):
        print(_overview(words[0]))
        return 0
    name, rest = _verb(words)
    cls: type[Spec] = _load(VERBS[name].spec)  # type: ignore[assignment]
    arguments = read_arguments(cls, rest)
    if arguments.help:
        print(help_text(name, cls))
        return 0
    spec = _resolve(cls, arguments)
    if arguments.dry_run:
        return _dry_run(name, spec, arguments)
    signal.signal(signal.SIGTERM, _interrupt)
    result = _load(VERBS[name].recipe)(spec, _terminal(), *([_tell_ready] if arguments.json else []))
    if arguments.json and result is not None:
        print(json.dumps(as_json(result), ensure_ascii=False))
    return 0


def _verb(words: Sequence[str]) -> tuple[str, list[str]]:
    """The verb, of one word or two, and what follows it."""
    for length in (2, 1):
        if (name := " ".join(words[:length])) in VERBS:
            return name, list(words[length:])
    below = [name for name in VERBS if name.startswith(f"{words[0]} ")]
    raise UserError(f"there is no verb {' '.join(words[:2 if below else 1])!r}", remedy=f"verbs are: {', '.join(below or VERBS)}")


def _resolve(cls: type[Spec], arguments: Arguments) -> Spec:
    """The spec file first, the options over it; `--resume RUN` takes the spec of that run as the file."""
    below: dict[str, object] = {}
    where = "options"
    resumed = arguments.values.get("resume")
    if isinstance(resumed, str) and cls.model_fields["resume"].annotation is not bool:
        below, where = merge(read_values(Path(resumed) / "spec.json"), {"out": resumed}), f"{resumed}/spec.json"
    if arguments.spec_file is not None:
        below, where = merge(below, read_values(arguments.spec_file)), str(arguments.spec_file)
    return cls.parse(merge(below, arguments.values), where=where)


def _dry_run(name: str, spec: Spec, arguments: Arguments) -> int:
    """Print the resolved spec, and the plan of verbs that have one."""
    module = importlib.import_module(f"garage.{VERBS[name].recipe.partition(':')[0]}")
    plan: dict[str, object] = module.plan(spec) if hasattr(module, "plan") else {}
    print(f"# garage {name}\n{to_toml(spec.resolved())}")
    for key, value in plan.items():
        print(f"# {key}: {value}")
    if arguments.json:
        print(json.dumps({"spec": spec.resolved(), "plan": plan}, ensure_ascii=False))
    return 0


def _terminal() -> Callable[..., None]:
    from garage.recipes.progress import Terminal  # rich is imported only when something runs

    return Terminal()


def _tell_ready(event: Mapping[str, object]) -> None:
    """A verb that goes on until it is stopped has its JSON line when it begins to answer."""
    if event["kind"] == "ready":
        print(json.dumps({key: value for key, value in event.items() if key not in ("time", "kind")}), flush=True)


def as_json(result: object) -> object:
    """A recipe's result as plain JSON values."""
    if dataclasses.is_dataclass(result) and not isinstance(result, type):
        return {f.name: as_json(getattr(result, f.name)) for f in dataclasses.fields(result)}
    if isinstance(result, dict):
        return {str(k): as_json(v) for k, v in result.items()}
    if isinstance(result, list | tuple):
        return [as_json(item) for item in result]
    return str(result) if isinstance(result, Path) else result


def _overview(group: str = "") -> str:
    """The verbs, or those of one group."""
    lines = [f"usage: garage {group or 'VERB'}{' VERB' * bool(group)} [SPEC.toml] [arguments] [--option VALUE ...]", ""]
    lines += ["From your documents to a tuned, evaluated, exported and served model.", ""]
    lines += [f"  {name:<21} {verb.about}" for name, verb in VERBS.items() if name.startswith(group)]
    lines += ["", "`garage VERB --help` lists a verb's options. A MODEL is a directory, a Hub id (org/name), a run, or nano."]
    return "\n".join(lines)


def _load(place: str) -> Callable[..., object]:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(f"garage.{module}"), name)  # type: ignore[no-any-return]


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
