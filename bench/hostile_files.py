"""Whether every hostile file costs only itself: `garage ingest` on each of them, one by one, in a home and a temporary folder of its own.

    python bench/hostile_files.py [PART OF A NAME]

Each must end within 60 s and 1 GiB with a document, or with exit code 2, an error and a remedy; it must leave no file anywhere but in its
corpus, and must not reach the server that waits where some of them point (127.0.0.1:9, if this user may listen there). Broken twin: the
files that the jail had to stop are read once more by the same parser in a process without limits, which must fail on some of them.

This process stays small (no torch, no file in it) until all is measured: the peak memory of a child counts from its parent's size.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

REPO = Path(__file__).parents[1]
SECONDS, MEMORY, GIVE_UP = 60.0, 1 << 30, 90.0
STOPPED = ("reading it fails", "needs more than", "nested too deeply", "memory")


@dataclass(frozen=True)
class Outcome:
    """What became of one file. `verdict` is "read", "refused", or what is wrong: "crashed", "late", "large", "left files", "connected"."""

    name: str
    bytes: int
    verdict: str
    seconds: float
    mebibytes: int
    said: str


class Canary:
    """A server that counts who comes."""

    def __init__(self) -> None:
        self.visits, self.is_there = 0, True
        try:
            self._server = socket.create_server(("127.0.0.1", 9))
            threading.Thread(target=self._count, daemon=True).start()
        except OSError:
            self.is_there = False

    def _count(self) -> None:
        while True:
            self._server.accept()[0].close()
            self.visits += 1


@contextlib.contextmanager
def rooms() -> Iterator[Mapping[str, Path]]:
    """Folders of this run: what is given, where it works, its home, its temporary files and its result."""
    with tempfile.TemporaryDirectory(prefix="hostile-") as folder:
        places = {name: Path(folder) / name for name in ("given", "work", "home", "temporary", "out")}
        for name in ("given", "work", "home", "temporary"):
            places[name].mkdir()
        yield places


def run(command: Sequence[str], places: Mapping[str, Path]) -> tuple[int, float, int, str]:
    """Exit code, seconds, peak MiB of any process of it, and what it said."""
    env = {"PATH": os.environ["PATH"], "HOME": str(places["home"]), "TMPDIR": str(places["temporary"]), "PYTHONPATH": str(REPO)}
    start, said = time.monotonic(), places["out"].with_suffix(".said")
    with open(said, "wb") as output:
        process = subprocess.Popen(command, env=env, cwd=places["work"], stdout=output, stderr=output, start_new_session=True)
        clock = threading.Timer(GIVE_UP, process.kill)
        clock.start()
        _, status, usage = os.wait4(process.pid, 0)
        clock.cancel()
    code = os.waitstatus_to_exitcode(status)
    return code, time.monotonic() - start, usage.ru_maxrss >> 10, said.read_text(errors="replace")


def judged(file: Path, canary: Canary, *, twin: bool = False) -> Outcome:
    """One file through `garage ingest`, or by the parser alone."""
    with rooms() as places:
        name, path = file.name, places["given"] / file.name
        os.link(file, path)
        command = [sys.executable, __file__, "--twin", str(path)] if twin else [
            sys.executable, "-m", "garage", "ingest", str(path), "--out", str(places["out"]), "--seconds_per_file", "30"]  # fmt: skip
        visits, before = canary.visits, names(places)
        code, seconds, mebibytes, said = run(command, places)
        left = names(places) - before
        is_right = code == 0 or (code == 2 and "remedy" in said)
        faults = {"crashed": not is_right, "late": seconds > SECONDS, "large": mebibytes > MEMORY >> 20, "left files": bool(left),
                  "connected": canary.visits > visits}  # fmt: skip
        verdict = next((fault for fault, is_so in faults.items() if is_so), "read" if code == 0 else "refused")
        said = " | ".join(line.strip() for line in said.replace(f"{REPO}/", "").splitlines() if not line.startswith("reading "))
        return Outcome(name, path.stat().st_size, verdict, round(seconds, 2), mebibytes, said.replace(str(places["given"]), "")[:300])


def names(places: Mapping[str, Path]) -> set[str]:
    """All files that could have been written, but for the corpus, and what a name of ours would make of an escape."""
    here = {str(file) for room in ("given", "work", "home", "temporary") for file in places[room].rglob("*") if file.is_file()}
    return here | {str(file) for place in (Path("/tmp"), Path("/etc"), places["out"].parent, REPO) for file in place.glob("escaped*")}


def twin(path: Path) -> int:
    """The same parser, in a process like any other."""
    from garage.core.errors import UserError
    from garage.data.extract import extract

    try:
        reply = extract(path)
    except UserError as error:
        print(error)
        return 2
    print(sum(map(len, reply.pages)), "characters")
    return 0


def main() -> None:
    if sys.argv[1:2] == ["--twin"]:
        raise SystemExit(twin(Path(sys.argv[2])))
    wanted, canary, outcomes = (sys.argv[1:] or [""])[0], Canary(), list[Outcome]()
    with tempfile.TemporaryDirectory(prefix="hostile-files-") as folder:
        subprocess.run([sys.executable, str(Path(__file__).parent / "samples" / "make_hostile.py"), folder], check=True)
        files = sorted(file for file in Path(folder).iterdir() if wanted in file.name)
        for file in files:
            outcomes.append(outcome := judged(file, canary))
            head = f"{outcome.verdict:10} {outcome.seconds:6.2f} s {outcome.mebibytes:5} MiB"
            print(f"{head}  {ascii(file.name)[:50]:50} {ascii(outcome.said)[:140]}", flush=True)
        stopped = {outcome.name for outcome in outcomes if any(sign in outcome.said for sign in STOPPED)}
        twins = [judged(file, canary, twin=True) for file in files if file.name in stopped and file.suffix != ".zip"]
    figures = {
        "files": len(outcomes), "verdicts": dict(Counter(outcome.verdict for outcome in outcomes)),
        "slowest_seconds": max(outcome.seconds for outcome in outcomes),
        "largest_mebibytes": max(outcome.mebibytes for outcome in outcomes),
        "canary_listened": canary.is_there, "canary_visits": canary.visits,
        "twin": {"files": len(twins), "verdicts": dict(Counter(outcome.verdict for outcome in twins)),
                 "failed": [asdict(outcome) for outcome in twins if outcome.verdict not in ("read", "refused")]},
        "table": [asdict(outcome) | {"name": ascii(outcome.name).strip("'"), "said": ascii(outcome.said)[1:-1]} for outcome in outcomes],
    }  # fmt: skip
    print(json.dumps({key: value for key, value in figures.items() if key != "table"}, indent=1))
    if not wanted:
        from record import record, typed

        print("->", record("hostile_files", typed(), figures))


if __name__ == "__main__":
    main()
