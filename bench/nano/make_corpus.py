"""Writes nano's pretraining corpus: JSON Lines of conversations and plain texts, from generators alone.

    python bench/nano/make_corpus.py --tokens 20_000_000 --out DIR [--seed 0]

writes DIR/corpus.jsonl. The same seed gives the same file. Tokens are estimated at 3.3 characters each; the true count depends on
the tokenizer. No row holds anything of the sample documents: a row that names one of their people, places or products, or that states
one of their facts even by chance, is drawn again.
"""

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

import prose  # noqa: E402
import reading  # noqa: E402
import sums  # noqa: E402
import tasks  # noqa: E402

from garage.core.seeds import derive  # noqa: E402
from garage.data.ingest import ingest  # noqa: E402
from garage.data.synthesize import facts  # noqa: E402
from garage.specs.data import IngestSpec  # noqa: E402
from garage.store.corpus import read_chunks  # noqa: E402

CHARS_PER_TOKEN = 3.3
MIXTURE: dict[str, tuple[float, Callable[[Random], dict[str, object]]]] = {  # share of the characters
    "reading": (0.31, reading.conversation),
    "look-up": (0.05, reading.lookup),
    "echo": (0.035, reading.echo),
    "documents": (0.04, reading.plain),
    "told": (0.04, reading.told),
    "unknown": (0.012, reading.unknown),
    "almanac": (0.045, reading.almanac),
    "instructions": (0.1, tasks.instructions),
    "by heart": (0.04, tasks.by_heart),
    "worksheets": (0.13, sums.worksheet),
    "stories": (0.09, sums.stories),
    "arithmetic": (0.03, tasks.arithmetic),
    "drills": (0.03, sums.drill),
    "prose": (0.03, prose.text),
    "asked prose": (0.018, prose.asked),
}
SAMPLES = Path(__file__).parents[2] / "garage" / "assets" / "examples" / "documents"
DEMO = re.compile(
    r"tidewheel|saltmere|lindqvist|joon park|osei\b|ridley|carvalho|priya nair|pedalboard|quay street|old harbour|northgate|fern valley|"
    r"gull island|lighthouse tour|orchard tour|sunset tour|0555 0142|commuter helmet|puncture repair|cargo bike|folding bike|city bike|"
    r"mountain bike|spoke key|master link|truing",
    re.IGNORECASE,
)


def size(row: dict[str, object]) -> int:
    """Characters of a row, its turns' frames counted as tokens."""
    if "text" in row:
        return len(str(row["text"]))
    messages = row["messages"]
    assert isinstance(messages, list)
    return sum(len(m["content"]) + 17 for m in messages)


def sample_facts() -> dict[str, set[str]]:
    """What the sample documents say: the values of each subject, in small letters."""
    known: dict[str, set[str]] = {}
    with TemporaryDirectory() as place:
        ingest(IngestSpec(paths=(SAMPLES,), out=Path(place) / "corpus"), count_tokens=lambda text: len(text) // 4)
        for fact in facts(read_chunks(Path(place) / "corpus")):
            known.setdefault(fact.subject.casefold(), set()).add(fact.value.casefold())
    return known


def states(text: str, known: dict[str, set[str]], subjects: re.Pattern[str]) -> bool:
    """Does a text have a subject of the sample documents and one of its values, as whole words, wherever they stand?"""
    text = text.casefold()
    found = set(subjects.findall(text))
    return any(re.search(rf"(?<!\w){re.escape(value)}(?!\w)", text) for subject in found for value in known[subject])


def rows(seed: int, characters: int) -> Iterator[tuple[str, dict[str, object]]]:
    """Rows in a mixed order; at each the kind that is most behind its share."""
    known = sample_facts()
    subjects = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, sorted(known, key=len, reverse=True)))})(?!\w)")
    rngs = {kind: Random(derive(seed, kind)) for kind in MIXTURE}
    done: Counter[str] = Counter()
    while sum(done.values()) < characters:
        kind = min(MIXTURE, key=lambda k: done[k] / MIXTURE[k][0])
        row = MIXTURE[kind][1](rngs[kind])
        text = "\n".join(m["content"] for m in row["messages"]) if "messages" in row else str(row["text"])
        if DEMO.search(text) or states(text, known, subjects):
            continue
        done[kind] += size(row)
        yield kind, row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=lambda text: int(text.replace("_", "")), default=20_000_000)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    count: Counter[str] = Counter()
    with open(args.out / "corpus.jsonl", "w", encoding="utf-8") as file:
        for kind, row in rows(args.seed, int(args.tokens * CHARS_PER_TOKEN)):
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            count[kind] += 1
    print(json.dumps({"rows": sum(count.values()), **count}))


if __name__ == "__main__":
    main()
