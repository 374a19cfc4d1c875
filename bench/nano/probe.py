"""Scores a model directory on fixed probes: unseen worlds, instructions, sums, worksheets of the test templates, things known by heart.

    python bench/nano/probe.py MODEL [--count 100]

prints one JSON object of shares between 0 and 1. Greedy; an answer counts if it equals the expected one, upper and lower case and the
final full stop aside; a word problem counts if its number is right (`loose`) and a worksheet if it also stands in the tags (`strict`).
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]

import reading  # noqa: E402
import sums  # noqa: E402
import tasks  # noqa: E402
import torch  # noqa: E402

from garage.core.types import Message, Request, Sampling  # noqa: E402
from garage.data.worksheets import problems  # noqa: E402
from garage.engine.engine import Engine  # noqa: E402
from garage.specs.serve import EngineSpec  # noqa: E402

SEED = 9_000_000  # far from the seeds of the corpus
Probe = tuple[tuple[Message, ...], str]


def single(make: Callable[[Random], tuple[str, str]], count: int, seed: int) -> list[Probe]:
    """Probes of one user turn."""
    rng = Random(SEED + seed)
    return [((Message("user", ask),), answer) for ask, answer in (make(rng) for _ in range(count))]


def last_turns(make: Callable[[Random], dict[str, object]], count: int, seed: int) -> list[Probe]:
    """Probes made of whole conversations: all turns but the last answer are given."""
    rng, probes = Random(SEED + seed), []
    while len(probes) < count:
        messages = make(rng)["messages"]
        assert isinstance(messages, list)
        turns = tuple(Message(m["role"], m["content"]) for m in messages)
        probes.append((turns[:-1], turns[-1].content))
    return probes


def first_turns(make: Callable[[Random], dict[str, object]], count: int, seed: int) -> list[Probe]:
    """Probes made of the first question of conversations."""
    rng, probes = Random(SEED + seed), []
    while len(probes) < count:
        messages = make(rng)["messages"]
        assert isinstance(messages, list)
        turns = [Message(m["role"], m["content"]) for m in messages]
        end = next(i for i, m in enumerate(turns) if m.role == "assistant")
        probes.append((tuple(turns[:end]), turns[end].content))
    return probes


def worksheets(level: int, count: int) -> list[Probe]:
    stream = problems(SEED, (level,), split="test")
    return [((Message("user", p.question),), str(p.answer)) for p in (next(stream) for _ in range(count))]


def same(text: str, answer: str) -> bool:
    plain = lambda t: re.sub(r"\s+", " ", t).strip().rstrip(".").casefold()  # noqa: E731
    return plain(text) == plain(answer)


def loose(text: str, answer: str) -> bool:
    found = re.search(r"<answer>\s*(-?\d+)", text) or (re.findall(r"(-?\d+)", text) or [""])[-1]
    return (found if isinstance(found, str) else found.group(1)) == answer


def strict(text: str, answer: str) -> bool:
    return re.fullmatch(rf"\s*<reasoning>[^<].*</reasoning>\s*<answer>\s*{answer}\s*</answer>\s*", text, re.DOTALL) is not None


def suites(count: int) -> dict[str, tuple[list[Probe], dict[str, Callable[[str, str], bool]]]]:
    exact = {"exact": same}
    found = {
        "reading": (first_turns(reading.conversation, count, 1), exact),
        "reading later": (last_turns(reading.conversation, count, 2), exact),
        "told": (last_turns(reading.told, count, 3), exact),
        "almanac": (first_turns(reading.almanac, count, 4), exact),
        "unknown": (first_turns(reading.unknown, count, 5), exact),
        "sums": (single(sums.sums, count, 6), exact),
        "by heart": (single(tasks.heart, count, 7), exact),
        "stories": (single(lambda rng: (task := sums.story(rng)) and (task.question, str(task.answer)), count, 8), {"loose": loose}),
        "worksheets 1": (worksheets(1, count), {"loose": loose, "strict": strict}),
        "worksheets 2": (worksheets(2, count), {"loose": loose, "strict": strict}),
    }
    each = {
        f"task {task.__name__}": (single(task, max(10, count // 4), 20 + i), exact) for i, task in enumerate(dict.fromkeys(tasks.TASKS))
    }
    return found | each


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--show", type=int, default=0, help="print this many answers of each suite")
    args = parser.parse_args()
    torch.set_num_threads(1)
    engine, scores = Engine.open(args.model, None, EngineSpec(dtype="float32")), {}
    for name, (probes, measures) in suites(args.count).items():
        requests = [
            Request(str(i), messages, Sampling(max_tokens=160 if "worksheets" in name else 60)) for i, (messages, _) in enumerate(probes)
        ]
        texts = [completion.text for completion in engine.generate(requests)]
        for measure, right in measures.items():
            hits = [right(text, answer) for text, (_, answer) in zip(texts, probes, strict=True)]
            scores[f"{name} {measure}".removesuffix(" exact")] = round(sum(hits) / len(hits), 3)
        for (messages, answer), text in list(zip(probes, texts, strict=True))[: args.show]:
            print(f"[{name}] {messages[-1].content[-200:]!r}\n   wanted {answer!r}\n   got    {text!r}", file=sys.stderr)
    print(json.dumps(scores))


if __name__ == "__main__":
    main()
