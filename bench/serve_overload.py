"""Ten times more than it can serve, and 2,000 requests that mean harm.

    overload    capacity is measured first: as many clients as sequences, each asking again at once. Then requests arrive at ten times that
                rate for 60 s, whatever becomes of the earlier ones. Every request ends: 200 whole, or 429 with Retry-After; none hangs;
                the process grows by less than 100 MB; tokens of whole answers per second >= 80 % of capacity; afterwards the server is
                idle, its pages are back and its books of requests balance.
    hostile     50 streams with seeds are asked on a quiet server (golden), then again and again while 2,000 hostile requests come in:
                every field of every shape at min - 1, min, max, max + 1, NaN and of a wrong type, lists too long, bombs of regex, schema
                and grammar, a million stop strings, bytes that are no UTF-8 or no JSON, ids beyond the vocabulary, broken HTTP, clients
                that read nothing and clients that vanish. Every victim's stream is byte for byte the golden one (ids of the request and
                the time taken out), no answer is 5xx, the process is the same one and answers.

    python bench/serve_overload.py                  stores bench/results/serve_overload.json (about 4 minutes)
    python bench/serve_overload.py --part hostile   one part; stores nothing
    python bench/serve_overload.py --smoke          seconds; stores nothing
"""

import argparse
import asyncio
import json
import random
import re
import sys
import time
from collections import Counter
from typing import Any

from record import record, typed
from serve_hostile import cases
from serving import CACHE, NANO, Reply, Server, ask, ask_all, model_dir, percentiles, random_prompts, served

BOOKS = ("accepted_total", "finished_total", "aborted_total", "failed_total", "in_flight")
GROWTH, GOODPUT, FACTOR, LIMIT = 100e6, 0.8, 10, 600
SEQS, WAITING, LENGTH = 16, 32, 32


def overload(seconds: float, model: str, threads: int) -> dict[str, Any]:
    """Capacity, then ten times as much."""
    log = CACHE / "overload.log"
    settings = {"max_num_seqs": SEQS, "max_waiting": WAITING, "max_model_len": 512, "num_pages": 256, "dtype": "bfloat16"}
    with served(model_dir(model), threads=threads, log=log, **settings) as server:
        asyncio.run(_closed(server, max(5.0, seconds / 5)))  # by then every page of the cache has been written once
        capacity = asyncio.run(_closed(server, max(5.0, seconds / 5)))
        before = server.memory()
        replies, seen = asyncio.run(_open(server, FACTOR * capacity / LENGTH, seconds))
        time.sleep(0.5)
        after = {name: server.metric(name) for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")}
        books = {n: server.metric(f"requests_{n}") for n in BOOKS}
    whole = [r for r in replies if r.status == 200 and r.is_done]
    span = max(r.ended for r in replies) - min(r.began for r in replies)
    goodput = len(whole) * LENGTH / span
    kinds = Counter(f"{r.status} {r.error}".strip() for r in replies)
    unguided = sum(r.status == 429 and not r.headers.get("retry-after", "").isdigit() for r in replies)
    wrong = len(replies) - len(whole) - kinds["429"]
    growth = max(seen) - before
    balance = books["accepted_total"] - books["finished_total"] - books["aborted_total"] - books["failed_total"] - books["in_flight"]
    return {
        "model": model, "capacity_tokens_per_second": round(capacity, 1), "asked_per_second": round(FACTOR * capacity / LENGTH, 1),
        "seconds": round(span, 1), "requests": len(replies), "answers": dict(kinds), "neither_whole_nor_429": wrong,
        "without_retry_after": unguided, "goodput_over_capacity": round(goodput / capacity, 3), "memory_growth_mb": round(growth / 1e6, 1),
        "seconds_to_429": percentiles([r.ended - r.began for r in replies if r.status == 429] or [0.0]),
        "seconds_to_first_token": percentiles([r.pieces[0][0] - r.began for r in whole]), "after": after, "books": books,
        "holds": not wrong and not unguided and goodput >= GOODPUT * capacity and abs(growth) <= GROWTH and not any(after.values())
        and balance == 0,
    }  # fmt: skip


def hostile(count: int, threads: int) -> dict[str, Any]:
    """Victims' streams beside hostile requests."""
    settings = {"dtype": "float32", "max_num_seqs": 64, "max_waiting": 4096, "max_model_len": 512, "num_pages": 8192}
    log = CACHE / "hostile.log"
    with served(NANO, threads=threads, log=log, **settings) as server:
        victims = _victims(server)
        golden = [_bytes(r) for r in asyncio.run(ask_all(server.url, "/v1/chat/completions", victims))]
        assert len(set(golden)) > 25, "the victims' answers do not differ"
        replies, rounds = asyncio.run(_beside(server, victims, count))
        is_same = server.process.poll() is None
        again = [_bytes(r) for r in asyncio.run(ask_all(server.url, "/v1/chat/completions", victims))]
        health = server.get("/health")
    changed = sum(_bytes(reply) != right for answers in rounds for reply, right in zip(answers, golden, strict=True))
    kinds = Counter(str(r.status or r.error.partition(":")[0] or "cut") for _, r in replies)
    broken = [(name, r.status, r.body[:300].decode(errors="replace")) for name, r in replies if r.status >= 500]
    hung = [name for name, r in replies if r.error == "timed out"]
    shapeless = [name for name, r in replies if 400 <= r.status < 500 and b'"error"' not in r.body and not name.startswith("http:")]
    accepted = Counter(name.partition("=")[0] for name, r in replies if r.status == 200)
    slowest = sorted(((round(r.ended - r.began, 2), name) for name, r in replies), reverse=True)[:5]
    return {
        "hostile": len(replies), "answers": dict(kinds), "5xx": broken, "hung": hung, "not_in_the_error_shape": shapeless[:10],
        "slowest": slowest, "victims": len(victims), "victim_rounds": len(rounds), "victims_changed": changed,
        "unchanged_after": again == golden, "same_process": is_same, "health": health, "accepted_by_kind": dict(accepted.most_common(20)),
        "holds": not broken and not hung and not shapeless and not changed and again == golden and is_same,
    }  # fmt: skip


async def _closed(server: Server, seconds: float) -> float:
    """Tokens per second when every client asks again as soon as it is answered."""
    end, made = time.perf_counter() + seconds, 0

    async def client(place: int) -> int:
        whole = 0
        while time.perf_counter() < end:
            reply = await ask(server.url, "/v1/completions", _plain(server, f"{place} {whole}"))
            assert reply.is_done, (reply.status, reply.error, reply.body[:200])
            whole += 1
        return whole

    began = time.perf_counter()
    made = sum(await asyncio.gather(*(client(i) for i in range(SEQS))))
    return made * LENGTH / (time.perf_counter() - began)


async def _open(server: Server, rate: float, seconds: float) -> tuple[list[Reply], list[int]]:
    """Requests at a fixed rate, and the server's memory twice a second."""
    draw, tasks, memory = random.Random("arrivals"), [], []
    bodies = [_plain(server, str(n)) for n in range(int(1.2 * rate * seconds))]  # drawing them takes time from the server
    began = now = time.perf_counter()
    seen = began
    while (at := time.perf_counter()) < began + seconds:
        while now <= at:
            body = bodies[len(tasks) % len(bodies)]
            tasks.append(asyncio.create_task(ask(server.url, "/v1/completions", body, timeout=LIMIT)))
            now += draw.expovariate(rate)
        if at >= seen:
            memory.append(server.memory())
            seen += 0.5
        await asyncio.sleep(max(0.0, min(now, seen) - time.perf_counter()))
    replies = await asyncio.gather(*tasks)
    return replies, [*memory, server.memory()]


def _plain(server: Server, seed: str) -> dict[str, object]:
    prompt = random_prompts(1, LENGTH, seed)[0]
    return {"model": server.model, "prompt": prompt, "max_tokens": LENGTH, "ignore_eos": True, "temperature": 0, "stream": True}


def _victims(server: Server) -> list[dict[str, object]]:
    asks = ("Tom has {} apples and eats 2. How many are left?", "Tell me about {} foxes.", "Write {} words about the sea.")
    return [
        {"model": server.model, "messages": [{"role": "user", "content": asks[i % 3].format(i + 3)}], "stream": True, "max_tokens": 48,
         "temperature": 1.0, "seed": i, "ignore_eos": True, "stream_options": {"include_usage": False}}
        for i in range(50)
    ]  # fmt: skip


def _bytes(reply: Reply) -> bytes:
    """The stream without what belongs to one request alone: its id and the time."""
    return b"%d " % reply.status + re.sub(rb'"id": ?"[^"]*"|"created": ?\d+', b"", reply.body)


async def _beside(server: Server, victims: list[dict[str, object]], count: int) -> tuple[list[tuple[str, Reply]], list[list[Reply]]]:
    """Victims in rounds until the last hostile request has ended; 32 hostile requests at a time."""
    todo = list(cases(count))
    replies: list[tuple[str, Reply]] = []

    async def enemy() -> None:
        while todo:
            name, send = todo.pop()
            replies.append((name, await send(server)))

    enemies = asyncio.gather(*(enemy() for _ in range(32)))
    rounds = []
    while not enemies.done() or not rounds:
        rounds.append(await asyncio.gather(*(ask(server.url, "/v1/chat/completions", body, timeout=LIMIT) for body in victims)))
    await enemies
    return replies, rounds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=("overload", "hostile"))
    parser.add_argument("--model", default="qwen3-135m")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--hostile", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    CACHE.mkdir(exist_ok=True)
    if options.smoke:
        options.seconds, options.hostile, options.threads, options.model = 4, 150, 1, "tiny"
    parts: dict[str, Any] = {
        "overload": lambda: overload(options.seconds, options.model, options.threads),
        "hostile": lambda: hostile(options.hostile, options.threads),
    }
    figures = {name: run() for name, run in parts.items() if options.part in (None, name)}
    print(json.dumps(figures, indent=1))
    if not options.smoke and options.part is None:
        print(record("serve_overload", typed(), figures))
    return 0 if all(part["holds"] for part in figures.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
