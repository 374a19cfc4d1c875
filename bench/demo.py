"""The demo, as `make demo` runs it: seconds of each step, and base against tuned on held-out questions.

    python bench/demo.py

runs `garage demo --json` in a fresh directory and stores what it prints, and its page as bench/results/demo.html.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time

from record import RESULTS, record


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        command = [sys.executable, "-m", "garage", "demo", "--out", f"{folder}/demo", "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        wall = round(time.perf_counter() - began, 1)
        found = json.loads(done.stdout.splitlines()[-1])
        shutil.copy(found["report"], RESULTS / "demo.html")
    kept = ("n", "accuracy", "ci95", "lenient", "mean_tokens")
    figures = {
        "wall_seconds": wall,
        "steps": found["steps"],
        "base": {key: found["base"][key] for key in kept},
        "tuned": {key: found["tuned"][key] for key in kept},
        "difference": {key: found["difference"][key] for key in ("delta", "ci95", "p", "verdict")},
        "elsewhere": {key: found["elsewhere"][key] for key in ("base", "tuned", "delta", "ci95", "p", "verdict")},
        "exports": [{"format": made["format"], "bytes": made["bytes"], "certificate": made["certificate"]} for made in found["exports"]],
    }
    print(json.dumps(figures, indent=1))
    print(record("demo", "garage demo --json", figures))


if __name__ == "__main__":
    main()
