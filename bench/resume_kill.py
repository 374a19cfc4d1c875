"""kill -9 training anywhere: the resumed run must equal the undisturbed one, bit for bit.

A tiny model with an adapter (dropout, so that random numbers matter) is trained by the product's own `fit` twice, in forked children:

    reference   one life, never disturbed
    disturbed   many lives; each dies by SIGKILL at a failpoint, the next one resumes

Every loss any life reported must equal the reference's, the final weights too, and no kill may cost more than one checkpoint interval.
Kills are placed by failpoint, not by time: a timer lands almost all of them in start-up and proves nothing. The product has no
failpoints; the children wrap its functions.

Every way of getting this wrong that we know of is a broken twin, and the same test on it must fail, by the check made for it.

    python bench/resume_kill.py                 200 kills, then all twins; stores bench/results/resume_kill.json
    python bench/resume_kill.py --small         20 kills and short twins, prints JSON, stores nothing (what the tests run)
"""

import argparse
import collections
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from record import record, typed
from safetensors.torch import load_file

from garage.core import artifact
from garage.core.events import EventLog, read_events
from garage.models.adapters import adapt
from garage.models.families import build, from_architecture, init_weights
from garage.models.layers import Model
from garage.specs.train import FitSpec
from garage.store import checkpoint as store
from garage.store.dataset import Encoded
from garage.train import loop, optim, resume
from garage.train.batches import Cursor
from garage.train.objectives.likelihood import Likelihood

PHASES = (
    "before_load", "after_load", "forward", "backward", "updated", "evaluated",
    "save:half_written", "save:files_written", "save:before_rename", "save:after_rename", "save:before_prune",
)  # fmt: skip
TWINS = {
    "no_rng": ("random states are not restored: other dropout masks after a resume", "every_loss_bit_identical"),
    "no_optimizer": ("the optimizer's moments are not restored", "every_loss_bit_identical"),
    "no_scheduler": ("the learning rate starts again with each life", "every_loss_bit_identical"),
    "no_cursor": ("the place in the data is not restored", "every_loss_bit_identical"),
    "no_weights": ("the weights are not restored", "every_loss_bit_identical"),
    "no_rename": ("writes into the final directory and reads the newest one unverified", "never_stuck"),
    "prune_first": ("removes older checkpoints before the new one is written", "at_most_one_interval_lost"),
    "no_fsync": ("never flushes: kill -9 keeps the page cache, only the order of calls shows it", "flushed_in_order"),
    "startup_only": ("a bad test: every kill lands before the first step", "not_vacuous"),
}


@dataclass(frozen=True)
class Plan:
    """One disturbed run. `per_phase` kills are asked of each failpoint; the rest land anywhere."""

    kills: int
    steps: int
    every: int
    per_phase: int
    seed: int = 0
    twin: str = ""


class Failpoint:
    """Dies by SIGKILL at the nth time that `phase` is passed ("*" counts every failpoint)."""

    def __init__(self, phase: str, nth: int, log: int) -> None:
        self.phase, self.nth, self.log = phase, nth, log

    def passed(self, name: str) -> None:
        if self.phase not in ("*", name):
            return
        self.nth -= 1
        if self.nth <= 0:
            os.write(self.log, f"{name}\n".encode())
            os.kill(os.getpid(), signal.SIGKILL)


def arm(point: Failpoint) -> None:
    """Put failpoints around the product's functions, in this process only."""

    def around(owner: object, name: str, *, before: str = "", after: str = "") -> None:
        real = getattr(owner, name)

        def wrapped(*args: object, **kwargs: object) -> object:
            point.passed(before)
            out = real(*args, **kwargs)
            point.passed(after)
            return out

        setattr(owner, name, wrapped)

    around(resume.Keeper, "restore", before="before_load", after="after_load")
    around(Likelihood, "loss", after="forward")
    around(loop._Trainer, "_gradient", after="backward")
    around(optim.AdamW, "step", after="updated")
    around(loop._Trainer, "_evaluate", after="evaluated")
    around(store, "_write_state", before="save:files_written")
    around(artifact, "_replace", before="save:before_rename", after="save:after_rename")
    around(resume, "prune", before="save:before_prune")
    real_save = store.save_file

    def half_then_whole(tensors: dict[str, torch.Tensor], path: Path) -> None:
        real_save(tensors, path)
        if path.name == "weights.safetensors":
            whole = path.read_bytes()
            path.write_bytes(whole[: len(whole) // 2])
            point.passed("save:half_written")
            path.write_bytes(whole)

    store.save_file = half_then_whole  # type: ignore[assignment]


def break_it(twin: str) -> None:
    """Turn the product into a broken twin, in this process only."""
    if twin == "no_rng":
        resume.set_random_state = lambda states: None
    elif twin == "no_optimizer":
        optim.AdamW.load = lambda self, state: None  # type: ignore[method-assign,assignment]
    elif twin == "no_weights":
        resume.Keeper._take = lambda self, checkpoint: None  # type: ignore[method-assign,assignment]
    elif twin == "no_cursor":
        real = resume._progress
        resume._progress = lambda raw: replace(real(raw), cursor=Cursor())
    elif twin == "no_fsync":
        artifact._flush = lambda path: None
    elif twin in ("no_scheduler", "no_rename", "prune_first"):
        {"no_scheduler": _restart_schedule, "no_rename": _write_in_place, "prune_first": _prune_first}[twin]()


def _restart_schedule() -> None:
    real, restore = loop.factor, resume.Keeper.restore
    start = [0]

    def noted(self: resume.Keeper, events: EventLog) -> resume.Progress:
        progress = restore(self, events)
        start[0] = progress.step
        return progress

    resume.Keeper.restore = noted  # type: ignore[method-assign]
    loop.factor = lambda step, total, spec: real(step - start[0], total, spec)


def _write_in_place() -> None:
    @contextmanager
    def writing(place: Path, *, kind: str) -> Iterator[artifact.Draft]:
        place.mkdir(parents=True, exist_ok=True)
        yield artifact.Draft(place)

    def unverified(place: Path) -> store.Checkpoint:
        state = json.loads((place / "state.json").read_text())
        return store.Checkpoint(state.pop("step"), {group: load_file(place / f"{group}.safetensors") for group in store.GROUPS}, state)

    store.writing, store.read_checkpoint = writing, unverified  # type: ignore[assignment]


def _prune_first() -> None:
    real = resume.write_checkpoint

    def write(run: Path, checkpoint: store.Checkpoint) -> Path:
        for step in store.saved_steps(run):
            shutil.rmtree(store.place_of(run, step))
        return real(run, checkpoint)

    resume.write_checkpoint = write


def make_model() -> Model:
    """One layer with an adapter; dropout makes the random state matter."""
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    config = from_architecture("qwen3", vocab_size=64, rope_theta=1e4, sliding_window=None, max_position_embeddings=64, **shape)
    model = build(config)
    init_weights(model, 0)
    adapt(model, rank=4, alpha=8, targets=("q_proj", "v_proj", "down_proj"), dropout=0.2, seed=0)
    model.model.embed_tokens.weight.requires_grad_(True)
    return model


def make_rows(count: int, seed: int) -> Encoded:
    """Rows of one length: fewer kernels to start, more lives a second."""
    draw = np.random.default_rng(seed)
    rows = (draw.integers(0, 61, (count, 1)) + draw.integers(1, 4, (count, 1)) * np.arange(12)) % 61
    return Encoded(rows.reshape(-1).astype("<u4"), np.ones(rows.size, "u1"), np.arange(count + 1) * 12)


def live(root: Path, plan: Plan) -> None:
    """One life: resume from the newest good checkpoint, run to the end, write the hash of the weights."""
    settings = {"max_steps": plan.steps, "batch_tokens": 88, "micro_tokens": 44, "max_length": 16, "dtype": "float32", "threads": 1}
    settings |= {"eval_every": 2 * plan.every, "save_every": plan.every, "optimizer": {"kind": "adamw", "lr": 3e-3}}
    model, events = make_model(), EventLog(root / "events.jsonl")
    loop.fit(model, train=make_rows(40, 1), held=make_rows(8, 2), spec=FitSpec.parse(settings), run=root, events=events)
    digest = hashlib.sha256()
    for _, tensor in sorted(model.state_dict().items()):
        digest.update(tensor.numpy().tobytes())
    (root / "final").write_text(digest.hexdigest())


def in_child(work: Callable[[], None], point: Failpoint | None = None, twin: str = "") -> int:
    """Fork from the warm parent (torch is imported once); returns the wait status."""
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    signal.alarm(300)  # a hang is a failure, not a wait
    try:
        break_it(twin)
        if point is not None:
            arm(point)
        work()
        os._exit(0)
    except BaseException as error:  # the edge of a process
        sys.stderr.write(f"{twin or 'good'}: child died: {type(error).__name__}: {str(error)[:120]}\n")
        os._exit(3)


def check_order(root: Path) -> None:
    """One save flushes every file and its directory before the rename, and the parent after it; calls are told apart by inode."""
    calls, real_fsync, real_rename = [], os.fsync, os.rename

    def fsync(handle: int) -> None:
        calls.append(("fsync", os.fstat(handle).st_ino))
        real_fsync(handle)

    def rename(old: Path, new: Path) -> None:
        calls.append(("rename", Path(old).stat().st_ino))
        real_rename(old, new)

    os.fsync, os.rename = fsync, rename  # type: ignore[assignment]
    tensors = {"weights": {"w": torch.ones(3)}, "optimizer": {}, "rng": {}}
    place = store.write_checkpoint(root, store.Checkpoint(1, tensors, {}))
    at = calls.index(("rename", place.stat().st_ino))
    needed = {("fsync", path.stat().st_ino) for path in (place, *place.iterdir())}
    if not (needed <= set(calls[:at]) and ("fsync", place.parent.stat().st_ino) in calls[at:]):
        raise SystemExit("not flushed in order")


def next_kill(index: int, plan: Plan, draw: random.Random, run: Path) -> tuple[str, int]:
    """Where the next life dies: each failpoint in turn first, then anywhere."""
    if plan.twin == "startup_only":
        return "before_load", 1
    left = plan.steps - max(store.saved_steps(run), default=0)
    if index < plan.per_phase * len(PHASES):
        phase = PHASES[index % len(PHASES)]
        nth = draw.randint(1, max(1, min(plan.every + 2, left))) if phase in ("forward", "backward", "updated") else 1
        return phase, nth
    per_step, per_save = 4, 5  # failpoints passed in one step (two forwards), and in one save
    per_interval = plan.every * per_step + per_save
    mean = per_interval * (left / max(1, plan.kills - index + 1) / plan.every + 0.5)
    return "*", min(draw.randint(1, max(2, int(2 * mean))), 2 + left * per_step)


def disturb(plan: Plan, root: Path) -> dict[str, object]:
    """The reference, the disturbed run, and the verdict."""
    reference, disturbed, draw = root / "reference", root / "disturbed", random.Random(plan.seed)
    is_ordered = in_child(lambda: check_order(root / "order"), twin=plan.twin) == 0
    if in_child(lambda: live(reference, plan)) != 0:
        raise SystemExit("the reference run failed")
    log, began = os.open(root / "hits", os.O_CREAT | os.O_APPEND | os.O_RDWR), time.monotonic()
    kills = crashes = 0
    while not (disturbed / "final").exists() and crashes < 3:
        point = Failpoint(*next_kill(kills, plan, draw, disturbed), log) if kills < plan.kills else None
        status = in_child(lambda: live(disturbed, plan), point, plan.twin)
        kills += os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        crashes += not os.WIFSIGNALED(status) and status != 0
    os.close(log)
    phases = collections.Counter((root / "hits").read_text().split())
    figures = judge(plan, reference, disturbed, phases)
    checks = figures.pop("checks")
    assert isinstance(checks, dict)
    checks |= {"never_stuck": crashes == 0, "flushed_in_order": is_ordered, "all_kills_landed": kills == plan.kills}
    failed = [name for name, held in checks.items() if not held]
    return figures | {"kills": kills, "crashes": crashes, "seconds": round(time.monotonic() - began, 1), "failed": failed, "ok": not failed}


def judge(plan: Plan, reference: Path, disturbed: Path, phases: collections.Counter[str]) -> dict[str, object]:
    """Compare all that any life reported with the reference."""
    want = {(step, name): value for step, name, value in reported(reference)}
    seen: set[tuple[int, str]] = set()
    differ = redone = lost = last = 0
    for step, name, value in reported(disturbed):
        differ += want.get((step, name)) != value
        redone += name == "loss" and (step, name) in seen
        lost = max(lost, last - step + 1) if name == "loss" and step <= last else lost
        last = step if name == "loss" else last
        seen.add((step, name))
    final = [(path / "final").read_text() if (path / "final").exists() else None for path in (reference, disturbed)]
    checks = {
        "every_loss_bit_identical": differ == 0 and seen == want.keys(),
        "final_weights_identical": final[0] == final[1],
        "at_most_one_interval_lost": lost <= plan.every,
        "not_vacuous": redone > 0 and all(phases[phase] >= plan.per_phase for phase in PHASES),
    }
    counts = {"steps": plan.steps, "every": plan.every, "redone": redone, "most_lost": lost, "differ": differ}
    return counts | {"phases": dict(phases), "checks": checks}


def reported(run: Path) -> Iterator[tuple[int, str, object]]:
    """Every figure that must be exact, in the order it was reported; JSON keeps all bits of a float."""
    for event in read_events(run / "events.jsonl"):
        for name in ("loss", "grad_norm", "lr", "held_loss") if event["kind"] == "metric" else ():
            if name in event:
                yield int(str(event["step"])), name, event[name]


def attempt(plan: Plan) -> dict[str, object]:
    root = Path(tempfile.mkdtemp(prefix="resume-kill-"))
    try:
        return disturb(plan, root)
    finally:
        shutil.rmtree(root, ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="20 kills, short twins, nothing stored")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    make_model()  # torch imports much of itself on first use: pay that once, before the forks
    good = Plan(22, 40, 4, 1, options.seed) if options.small else Plan(options.kills, 2 * options.kills, 5, 5, options.seed)
    short = Plan(11, 18, 3, 1, options.seed) if options.small else Plan(33, 66, 4, 2, options.seed)
    results = {"good": attempt(good)} | {twin: attempt(replace(short, twin=twin)) for twin in TWINS}
    caught = {twin: check in results[twin]["failed"] for twin, (_, check) in TWINS.items()}  # type: ignore[operator]
    print(json.dumps({"results": results, "caught": caught}))
    if not options.small:
        record("resume_kill", typed(), {"results": results, "caught": caught})
    return 0 if results["good"]["ok"] and all(caught.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
