"""Writes what the demo mixes in and measures so that tuning costs little: rows about other things than the sample documents.

    python bench/samples/make_general.py

general.jsonl is mixed into the training rows, so that nano keeps what it knew; elsewhere.jsonl measures what was kept. Half of each ask
plain facts that nano knows by heart, half ask about a page that stands in the question. No question stands in both. The seeds are far
from those of nano's training corpus, so the pages are new to it; the facts are the ones it has learned.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random

REPO = Path(__file__).parents[2]
sys.path.insert(0, str(REPO / "bench" / "nano"))

import reading  # noqa: E402
import tasks  # noqa: E402

ASSETS = REPO / "garage" / "assets" / "examples"
SEED = 77_000_000
SIZES = {"elsewhere": 50, "general": 200}  # of each half
LONGEST = 700  # characters of a page


def pages(rng: Random) -> dict[str, object]:
    """The first question of a conversation about a page."""
    messages = reading.conversation(rng)["messages"]
    assert isinstance(messages, list)
    end = next(place for place, message in enumerate(messages) if message["role"] == "assistant")
    return {"messages": messages[: end + 1]}


def facts(rng: Random) -> dict[str, object]:
    question, answer = tasks.heart(rng)
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def main() -> None:
    rng, seen = Random(SEED), set()
    for name, size in SIZES.items():
        rows = [row for make in (facts, pages) for row in draw(make, size, rng, seen)]
        text = "".join(json.dumps({"id": f"{name}-{n:03}", **row}, ensure_ascii=False) + "\n" for n, row in enumerate(rows))
        (ASSETS / f"{name}.jsonl").write_text(text, encoding="utf-8")


def draw(make: Callable[[Random], dict[str, object]], size: int, rng: Random, seen: set[str]) -> list[dict[str, object]]:
    """Rows whose question was not drawn before and is not long."""
    rows: list[dict[str, object]] = []
    while len(rows) < size:
        row = make(rng)
        question = json.dumps(row["messages"][:-1])  # type: ignore[index]
        if question not in seen and len(question) <= LONGEST:
            seen.add(question)
            rows.append(row)
    return rows


if __name__ == "__main__":
    main()
