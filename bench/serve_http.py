"""What the server costs, and that it loses nothing: streaming over HTTP beside the offline engine, and clients that vanish.

    speed   tokens/s of 8, 32 and 128 concurrent streams (64 in / 64 out) over HTTP >= 95 % of `Engine.generate` on the same requests.
            One process for each, both cores each, alternating rounds, fresh prompts in every round; the median of the rounds' ratios.
            The client shares the cores with the server: its share of them is part of the cost.
    streams 1,000 concurrent streaming clients x 64 tokens on a tiny model in float32: the token ids and the text that came in pieces
            are those the offline engine gives for the request: none lost, doubled, reordered or swapped. Its twin repeats one token.
    cuts    500 streaming clients, each cut at a random moment: after the last cut at most two more steps run before every page is back,
            every accepted request is counted once as ended, and the books balance. A step takes at least 20 ms here, as on a real
            model, and everything is in one process so that steps can be counted. Its twin forgets one abort.

    python bench/serve_http.py                  stores bench/results/serve_http.json (about 4 minutes)
    python bench/serve_http.py --part streams   one part; stores nothing
    python bench/serve_http.py --smoke          seconds; stores nothing
"""

import argparse
import asyncio
import json
import random
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import contextmanager
from itertools import pairwise
from statistics import median
from typing import Any

from record import record, typed
from serve_throughput import Side
from serving import Reply, Server, ask, ask_all, model_dir, percentiles, random_prompts, served

from garage.core.types import Request, Sampling
from garage.engine.engine import Engine
from garage.serve.loop import EngineLoop
from garage.serve.server import running
from garage.specs.serve import EngineSpec, ServeSpec

SHOWN = {"logprobs": 0, "return_tokens_as_token_ids": True}
"""Every piece of a stream names the ids of its tokens."""
LEAST, STEP_SECONDS, CUT_TOKENS = 0.95, 0.02, 200
COUNTED = ("accepted", "finished", "aborted", "failed", "in_flight")
TINY = {"dtype": "float32", "max_num_seqs": 256, "max_model_len": 512, "num_pages": 16_384, "max_waiting": 2048}


def speed(counts: Sequence[int], rounds: int, threads: int, model: str) -> list[dict[str, Any]]:
    """Output tokens per second over HTTP and offline."""
    directory, found = model_dir(model), []
    offline = Side("garage_bf16", directory, argparse.Namespace(vllm_python="", llama_python="", threads=threads))
    settings = {"dtype": "bfloat16", "max_num_seqs": 128, "max_model_len": 512, "enable_prefix_caching": False, "num_pages": 4096}
    with served(directory, threads=threads, **settings) as server:
        for count in counts:
            pairs = []
            for number in range(-1, rounds):  # the first is a warm-up
                prompts = random_prompts(count, 64, f"http {count} {number}")
                first = _online(server, prompts) if number % 2 else None
                engine = _offline(offline, prompts)
                pairs.append((engine, first or _online(server, prompts)))
            ratio = median(ours["rate"] / engine["rate"] for engine, ours in pairs[1:])
            times = {name: percentiles([v for _, ours in pairs[1:] for v in ours[name]]) for name in ("ttft", "itl")}
            rates = {name: [round(pair[i]["rate"], 1) for pair in pairs[1:]] for i, name in enumerate(("offline", "http"))}
            found.append({"clients": count, "ratio": round(ratio, 4), **times, **rates, "holds": ratio >= LEAST})
            print(json.dumps(found[-1]), file=sys.stderr, flush=True)
    offline.close()
    return found


def streams(count: int, broken: int | None = None) -> dict[str, Any]:
    """Compare every stream's token ids with the offline engine's; `broken` repeats a token of that stream on the way."""
    directory = model_dir("tiny")
    asked = list(zip(random_prompts(count, range(4, 65), "streams"), range(count), strict=True))
    sampled = [Request(str(seed), tuple(ids), Sampling(max_tokens=64, ignore_eos=True, temperature=1.0, seed=seed)) for ids, seed in asked]
    engine = Engine.open(directory, None, EngineSpec.parse(TINY))
    wanted = engine.generate(sampled)
    del engine
    with served(directory, threads=1, **TINY) as server:
        bodies = [_body(ids, 64, temperature=1.0, seed=seed, **SHOWN) for ids, seed in asked]
        before, began = server.metric("generation_tokens_total"), time.perf_counter()
        replies = asyncio.run(ask_all(server.url, "/v1/completions", bodies))
        seconds = time.perf_counter() - began
        counted = server.metric("generation_tokens_total") - before
    got = [_ids(reply) for reply in replies]
    if broken is not None:
        got[broken].insert(10, got[broken][10])
    wrong = [i for i, (ids, right) in enumerate(zip(got, wanted, strict=True)) if tuple(ids) != right.token_ids]
    wrong += [i for i, (reply, right) in enumerate(zip(replies, wanted, strict=True)) if _text(reply) != right.text]
    unfinished = [i for i, reply in enumerate(replies) if not (reply.status == 200 and reply.is_done)]
    return {"clients": count, "wrong": wrong, "unfinished": unfinished, "tokens_counted": counted, "seconds": round(seconds, 1),
            "tokens_per_second": round(count * 64 / seconds), "different_texts": len({tuple(ids) for ids in got}),
            "holds": not wrong and not unfinished and counted == count * 64}  # fmt: skip


def cuts(count: int, *, forget: bool = False) -> dict[str, Any]:
    """Cut every client at random; `forget` is the twin that drops one abort."""
    directory = model_dir("tiny")
    engine = Engine.open(directory, None, EngineSpec.parse(TINY | {"max_num_seqs": 64}))
    steps, step = 0, engine.step

    def slow() -> Any:
        nonlocal steps
        steps += 1
        time.sleep(STEP_SECONDS)
        return step()

    engine.step = slow  # type: ignore[method-assign]
    with _forgetting(forget), running(engine, ServeSpec(model=str(directory), served_model_name="bench", port=0, drain_seconds=1)) as url:
        baseline = engine.stats().num_pages_used
        replies = asyncio.run(_cut_all(url, count))
        last, end = steps, time.monotonic() + 5
        while engine.has_work and time.monotonic() < end:
            time.sleep(STEP_SECONDS / 20)
        after = steps - last
        pages = engine.stats().num_pages_used - baseline
        left = len(engine.active_ids)
        if not left:
            engine.check_books()
        text = _metrics(url)
    counted = {n: sum(v for name, v in text.items() if name.startswith(f"garage:requests_{n}")) for n in COUNTED}
    is_conserved = counted["accepted"] == counted["finished"] + counted["aborted"] and not counted["in_flight"]
    is_conserved = is_conserved and 0.9 * count <= counted["accepted"] <= count  # a few had left before they were heard
    return {"clients": count, "steps_after_the_last_cut": after, "pages_not_back": pages, "requests_left": left, "steps": steps,
            "counted": counted, "refused": sum(reply.status not in (0, 200) for reply in replies), "is_conserved": is_conserved,
            "holds": after <= 2 and pages == 0 and left == 0 and is_conserved}  # fmt: skip


async def _cut_all(url: str, count: int) -> list[Reply]:
    """Clients that come over two seconds and vanish at any moment, the last 32 together; some before their first token."""
    draw = random.Random("cuts")
    prompts = random_prompts(count, range(4, 65), "cuts")

    async def one(place: int) -> Reply:
        await asyncio.sleep(draw.random() * 2)
        task = asyncio.create_task(ask(url, "/v1/completions", _body(prompts[place], CUT_TOKENS)))
        wait = draw.random() * 2.5 if place >= 32 else max(0.0, began + 5 - time.monotonic())
        _, running_still = await asyncio.wait({task}, timeout=wait)
        if running_still:
            task.cancel()
        found = await asyncio.gather(task, return_exceptions=True)
        return found[0] if isinstance(found[0], Reply) else Reply(0.0)

    began = time.monotonic()
    return await asyncio.gather(*(one(i) for i in range(count)))


@contextmanager
def _forgetting(is_on: bool) -> Any:
    """A server that loses one abort."""
    real, lock, lost = EngineLoop.abort, threading.Lock(), []

    def abort(self: EngineLoop, ticket: Any) -> None:
        with lock:
            if not lost and any(name in self._engine.active_ids for name in (r.id for r in ticket.requests)):
                lost.append(ticket)
        if ticket not in lost:
            real(self, ticket)

    if is_on:
        EngineLoop.abort = abort  # type: ignore[method-assign]
    try:
        yield
    finally:
        EngineLoop.abort = real  # type: ignore[method-assign]


def _offline(side: Side, prompts: list[list[int]]) -> dict[str, Any]:
    return {"rate": len(prompts) * 64 / side.run(prompts, [64] * len(prompts))["seconds"]}


def _online(server: Server, prompts: list[list[int]]) -> dict[str, Any]:
    bodies = [_body(ids, 64, temperature=0) for ids in prompts]
    replies = asyncio.run(ask_all(server.url, "/v1/completions", bodies))
    assert all(reply.status == 200 and reply.is_done for reply in replies), [r.error or r.body[:200] for r in replies if not r.is_done][:3]
    seconds = max(reply.ended for reply in replies) - min(reply.began for reply in replies)
    heard = [[when for when, _ in reply.pieces] for reply in replies]
    gaps = [b - a for times in heard for a, b in pairwise(times[:-1])]
    return {"rate": len(prompts) * 64 / seconds, "ttft": [times[0] - r.began for times, r in zip(heard, replies, strict=True)], "itl": gaps}


def _body(prompt: list[int], tokens: int, **more: object) -> dict[str, object]:
    return {"model": "bench", "prompt": prompt, "stream": True, "max_tokens": tokens, "ignore_eos": True, **more}


def _ids(reply: Reply) -> list[int]:
    """The ids of the tokens in the order in which they came."""
    shown = [choice["logprobs"] for _, event in reply.events() for choice in event["choices"] if choice["logprobs"]]
    return [int(name.removeprefix("token_id:")) for each in shown for name in each["tokens"]]


def _text(reply: Reply) -> str:
    return "".join(choice["text"] for _, event in reply.events() for choice in event["choices"])


def _metrics(url: str) -> dict[str, float]:
    import urllib.request

    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as reply:
        lines = [line.rsplit(" ", 1) for line in reply.read().decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in lines}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=("speed", "streams", "cuts"))
    parser.add_argument("--model", default="qwen3-135m")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    small = options.smoke
    parts: dict[str, Any] = {
        "streams": lambda: {"run": streams(64 if small else 1000), "twin": streams(32, broken=7)},
        "cuts": lambda: {"run": cuts(60 if small else 500), "twin": cuts(60, forget=True)},
        "speed": lambda: speed((4,) if small else (8, 32, 128), 1 if small else options.rounds, 1 if small else options.threads,
                               "tiny" if small else options.model),
    }  # fmt: skip
    figures = {name: run() for name, run in parts.items() if options.part in (None, name)}
    print(json.dumps(figures, indent=1))
    checks = [figures[name] for name in ("streams", "cuts") if name in figures]
    holds = all(each["run"]["holds"] and not each["twin"]["holds"] for each in checks) and all(p["holds"] for p in figures.get("speed", []))
    if not small and options.part is None:
        print(record("serve_http", typed(), figures))
    return 0 if holds or (small and all(each["run"]["holds"] for each in checks)) else 1


if __name__ == "__main__":
    sys.exit(main())
