"""The embedded model on the first 100 questions of GSM8K's test file: honest numbers of a very small model.

    python bench/gsm8k_nano.py

runs `garage evaluate nano --task gsm8k --data ../shared/data/gsm8k/test.jsonl --limit 100 --json` and stores what it prints.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from record import record

DATA = Path(__file__).parents[2] / "shared" / "data" / "gsm8k" / "test.jsonl"
WORDS = ["evaluate", "nano", "--task", "gsm8k", "--data", str(DATA), "--limit", "100", "--json"]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        out = ["--out", f"{folder}/report"]
        done = subprocess.run([sys.executable, "-m", "garage", *WORDS, *out], capture_output=True, text=True, check=True)
    figures = json.loads(done.stdout.splitlines()[-1])
    del figures["items"]
    print(figures)
    print(record("gsm8k_nano", "garage evaluate nano --task gsm8k --data ../shared/data/gsm8k/test.jsonl --limit 100", figures))


if __name__ == "__main__":
    main()
