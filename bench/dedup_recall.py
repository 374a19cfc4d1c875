"""How many planted copies and planted test questions are found, level by level, and what is rejected that was not planted.

    python bench/dedup_recall.py [DIRECTORY]

Reads `gsm8k/train.jsonl` and `gsm8k/test.jsonl` below DIRECTORY (../shared/data). Into all training rows it plants, from 500 of them, exact
copies and near copies in which each word is replaced by a random one with a chance of 5, 10, 20 or 40 %, and counts which go for the row
they were made of (recall). A rejected row that was not planted is listed: GSM8K's own near copies are among them. Then it plants all 1,000
test questions that are there in the wordings of `WORDINGS` and counts which are recognised, and how many training rows are.
"""

import json
import random
import re
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from record import record, typed

from garage.core.types import Message, Row
from garage.data.decontaminate import RULES, built_in, contamination, words
from garage.data.dedup import deduplicate

SHARED = Path(__file__).parents[2] / "shared" / "data"
PLANTED, LEVELS, SETTINGS = 500, (0.0, 0.05, 0.1, 0.2, 0.4), ((0.7, 5), (0.5, 5), (0.7, 2), (0.5, 2))
SYNONYMS = {
    "many": "numerous", "total": "overall", "buys": "purchases", "bought": "purchased", "gives": "hands", "gave": "handed",
    "small": "little", "big": "large", "house": "home", "friends": "pals", "friend": "pal", "kids": "children", "makes": "produces",
    "made": "produced", "needs": "requires", "begin": "start", "began": "started", "every": "each", "also": "moreover",
    "after": "following", "if": "supposing", "then": "next", "more": "additional", "store": "shop", "money": "cash",
    "left": "remaining", "costs": "is priced at", "gets": "receives", "went": "travelled", "car": "automobile", "day": "date",
    "wants": "wishes", "uses": "employs", "sells": "vends", "sold": "vended",
}  # fmt: skip


def read(path: Path) -> list[Row]:
    raw = [json.loads(line) for line in path.open(encoding="utf-8")]
    turns = [(Message("user", each["question"]), Message("assistant", each["answer"])) for each in raw]
    return [Row(f"{path.stem}-{n}", messages) for n, messages in enumerate(turns, start=1)]


def words_of(train: list[Row]) -> list[str]:
    return sorted({word for row in train[:2000] for word in row.messages[0].content.split()})


def changed(text: str, share: float, rng: random.Random, vocabulary: list[str]) -> str:
    return " ".join(rng.choice(vocabulary) if rng.random() < share else word for word in text.split())


def other_numbers(text: str, rng: random.Random) -> str:
    return re.sub(r"\d+(?:,\d{3})*(?:\.\d+)?", lambda _: str(rng.randrange(2, 99)), text)


def synonyms(text: str) -> str:
    return re.sub(r"\w+", lambda found: SYNONYMS.get(found[0].lower(), found[0]), text)


def wordings(rng: random.Random, vocabulary: list[str]) -> dict[str, Callable[[str], str]]:
    return {
        "verbatim": str,
        "case and punctuation": lambda text: re.sub(r"[.,?!'’]", " ; ", text).upper(),
        "numbers changed": lambda text: other_numbers(text, rng),
        "inside a longer prompt": lambda text: f"Please help me with my homework: {text} Explain each step.",
        "synonyms": synonyms,
        "numbers changed and synonyms": lambda text: synonyms(other_numbers(text, rng)),
        **{f"{share:.0%} of words changed": (lambda text, share=share: changed(text, share, rng, vocabulary)) for share in LEVELS[1:]},
    }


def jaccard(one: Row, other: Row, width: int) -> float:
    sets = [{tuple(said[at : at + width]) for at in range(len(said) - width + 1)}
            for said in (words("\n".join(message.content for message in row.messages)) for row in (one, other))]  # fmt: skip
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def copies(train: list[Row], threshold: float, shingle: int) -> dict[str, object]:
    rng, vocabulary = random.Random(0), words_of(train)
    planted: dict[str, tuple[float, Row, Row]] = {}
    for level in LEVELS:
        for row in rng.sample(train, PLANTED):
            turns = tuple(Message(m.role, changed(m.content, level, rng, vocabulary)) for m in row.messages)
            planted[f"{row.id}-at-{level}"] = level, row, Row(f"{row.id}-at-{level}", turns)
    start, rows = time.perf_counter(), train + [copy for *_, copy in planted.values()]
    found = {row.id: reason for row, reason in deduplicate(rows, threshold=threshold, shingle=shingle) if reason}
    seconds, others, by_level = time.perf_counter() - start, {id: reason for id, reason in found.items() if id not in planted}, {}
    for level in LEVELS:
        group = [(original, copy) for at, original, copy in planted.values() if at == level]
        hits = sum(bool(re.search(rf" of {original.id}(-at-.*)?( |$)", found.get(copy.id, ""))) for original, copy in group)
        named = sum(copy.id in found for _, copy in group) + len(others)
        likeness = sum(jaccard(original, copy, shingle) for original, copy in group) / len(group)
        figures = {"recall": hits / len(group), "precision": round(hits / named, 4) if named else None, "mean_jaccard": round(likeness, 3)}
        by_level[f"{level:.0%} of words changed"] = figures
    return {"threshold": threshold, "shingle": shingle, "rows": len(rows), "seconds": round(seconds, 2), "by_level": by_level,
            "rejected_but_not_planted": len(others), "examples": dict(list(others.items())[:10])}  # fmt: skip


def questions(train: list[Row], test: list[Row]) -> dict[str, object]:
    rng, vocabulary = random.Random(1), words_of(train)
    prints, found = built_in(), {}
    start = time.perf_counter()
    touched = {row.id: reason for row in train if (reason := contamination(row, prints))}
    rate = len(train) / (time.perf_counter() - start)
    for name, reword in wordings(rng, vocabulary).items():
        asked = [(Message("user", reword(row.messages[0].content)), Message("assistant", "I think so.")) for row in test]
        hits = [[contamination(Row("x", turns), prints, (rule,)) != "" for rule in RULES] for turns in asked]
        num, by_rule = sum(map(any, hits)), {rule: sum(each[at] for each in hits) / len(test) for at, rule in enumerate(RULES)}
        found[name] = {"recall": num / len(test), "precision": round(num / (num + len(touched)), 4), "recall_by_rule": by_rule}
    return {"questions": len(test), "wordings": found, "training_rows": len(train), "training_rows_rejected": touched,
            "rows_per_second": round(rate)}  # fmt: skip


def main() -> None:
    place = Path(sys.argv[1]) if len(sys.argv) > 1 else SHARED
    train, test = read(place / "gsm8k" / "train.jsonl"), read(place / "gsm8k" / "test.jsonl")
    figures = {"rensa": version("rensa"), "dedup": [copies(train, *each) for each in SETTINGS], "decontaminate": questions(train, test)}
    print(json.dumps(figures, indent=1))
    print(record("dedup_recall", typed(), figures))


if __name__ == "__main__":
    main()
