"""A dataset of which memory holds no copy: `garage dataset map` over generated JSON Lines, its rows per second and its peak memory.

    python bench/big_jsonl.py                   5 GB, stores bench/results/big_jsonl.json
    python bench/big_jsonl.py --bytes 50_000_000   a smoke run; stores nothing

One line in 100,000 is damaged, so that the faults are counted on the way. The file and what is written are removed at the end.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from record import record, typed

FULL = 5_000_000_000
DAMAGED_EVERY = 100_000


def write(path: Path, size: int) -> tuple[int, int]:
    """Rows of about 2 kB; returns how many lines there are and how many are damaged."""
    body = "The quick brown fox jumps over the lazy dog. " * 40
    written, number, damaged = 0, 0, 0
    with open(path, "w", encoding="utf-8") as file:
        while written < size:
            line = json.dumps({"question": f"What happens in story {number}?", "answer": f"{number}: {body}"})
            if number % DAMAGED_EVERY == DAMAGED_EVERY - 1:
                line, damaged = line[:-20], damaged + 1
            written += file.write(line + "\n")
            number += 1
    return number, damaged


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bytes", type=lambda text: int(text.replace("_", "")), default=FULL)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "big.jsonl"
        lines, damaged = write(path, options.bytes)
        start = time.perf_counter()
        command = [sys.executable, "-m", "garage", "dataset", "map", str(path), "--rows", "0", "--out", f"{place}/out", "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        seconds, peak = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        made = json.loads(done.stdout.splitlines()[-1])
    assert made["rows"]["train"] == lines - damaged and sum(made["counts"].values()) == damaged
    figures = {"bytes": options.bytes, "lines": lines, "damaged": damaged, "seconds": round(seconds, 1)}
    figures |= {"rows_per_second": round(lines / seconds), "peak_bytes": peak}
    print(json.dumps(figures))
    if options.bytes == FULL:
        record("big_jsonl", typed(), figures)
    return 0 if peak < 512 << 20 else 1


if __name__ == "__main__":
    sys.exit(main())
