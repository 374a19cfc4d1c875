"""Writes garage/assets/fingerprints.bin: GSM8K's test questions and AIME 2024 as hashes, never as texts.

    python bench/samples/make_fingerprints.py [DIRECTORY]

reads `gsm8k/test.jsonl` and `aime/aime24.jsonl` below DIRECTORY (../shared/data). The GSM8K file there holds the first 1,000 of the 1,319
test questions; the asset says so, and the other 319 are not recognised until the complete file is given here.
"""

import sys
from pathlib import Path

from garage.data.decontaminate import fingerprint, pack
from garage.data.read import read_dataset

ROOT = Path(__file__).parents[2]
SETS = {"gsm8k-test": ("gsm8k/test.jsonl", 1319), "aime-2024": ("aime/aime24.jsonl", 30)}


def main() -> None:
    place = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT.parent / "shared" / "data"
    prints = []
    for name, (path, whole) in SETS.items():
        rows = list(read_dataset(place / path))
        prints.append(fingerprint(name, rows, about=f"{len(rows):,} of the {whole:,} questions of {name}"))
        print(prints[-1].about, {rule: len(getattr(prints[-1], rule)) for rule in ("question", "template", "ngram")})
    data = pack(prints)
    (ROOT / "garage" / "assets" / "fingerprints.bin").write_bytes(data)
    print(f"{len(data):,} bytes")


if __name__ == "__main__":
    main()
