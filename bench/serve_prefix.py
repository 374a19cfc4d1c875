"""Time to the first token of requests that share a 1,024-token prefix, with the prefix cache and without.

Two servers, one with the cache and one without, get the same requests one at a time, alternating: a prefix of 1,024 random ids and 16 ids
of its own. `first` is the first request of a prefix (nothing is known yet; it also shows what keeping the pages costs), `later` those that
follow. Then a burst: 16 requests with the prefix at once. Claim: `later` is at least five times faster with the cache, `first` takes at
most 1.1 times as long, and the answers are the same token for token (float32; random weights).

    python bench/serve_prefix.py                          stores bench/results/serve_prefix_qwen3-135m.json (about 3 minutes)
    python bench/serve_prefix.py --model gemma3-270m      sliding windows
    python bench/serve_prefix.py --smoke                  seconds, a tiny shape; stores nothing
"""

import argparse
import asyncio
import json
import sys
from statistics import median
from typing import Any

from record import record, typed
from serving import MODELS, Reply, Server, ask_all, model_dir, percentiles, random_prompts, served

PREFIX, OWN, BURST, OUT = 1024, 16, 16, 8


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="qwen3-135m")
    parser.add_argument("--prefixes", type=int, default=5)
    parser.add_argument("--later", type=int, default=6)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    if options.smoke:
        options.model, options.prefixes, options.later, options.threads = "tiny", 2, 2, 1
    directory = model_dir(options.model)
    settings: dict[str, Any] = {"dtype": "float32", "max_model_len": 1536, "num_pages": 4096, "threads": options.threads}
    with (
        served(directory, enable_prefix_caching=True, **settings) as cached,
        served(directory, enable_prefix_caching=False, **settings) as plain,
    ):
        servers = {"cached": cached, "plain": plain}
        for server in servers.values():
            _asked(server, [random_prompts(1, PREFIX, "warm-up")[0]])
        rounds = [_round(servers, number, options.later) for number in range(options.prefixes)]
        hits = cached.metric("prefix_cache_hits_total")
    times = {name: {kind: [t for r in rounds for t in r[name][kind]] for kind in ("first", "later", "burst")} for name in servers}
    figures: dict[str, Any] = {name: {kind: percentiles(values) for kind, values in each.items()} for name, each in times.items()}
    ratio = {kind: round(median(times["plain"][kind]) / median(times["cached"][kind]), 2) for kind in ("first", "later", "burst")}
    is_same = all(r["cached"]["texts"] == r["plain"]["texts"] for r in rounds)
    holds = ratio["later"] >= 5 and ratio["first"] >= 1 / 1.1 and is_same
    figures |= {"model": options.model, "plain_over_cached": ratio, "same_answers": is_same, "cached_tokens": hits, "holds": holds}
    print(json.dumps(figures, indent=1))
    if options.smoke:
        return 0 if is_same and hits else 1
    print(record(f"serve_prefix_{options.model}", typed(), figures | {"raw": times}))
    return 0 if holds else 1


def _round(servers: dict[str, Server], number: int, later: int) -> dict[str, dict[str, Any]]:
    """One prefix at both servers; which comes first alternates."""
    prefix = random_prompts(1, PREFIX, f"prefix {number}")[0]
    own = random_prompts(1 + later + BURST, OWN, f"own {number}")
    found: dict[str, dict[str, Any]] = {name: {"first": [], "later": [], "texts": []} for name in servers}
    for place, tail in enumerate(own[: 1 + later]):
        for name in sorted(servers, reverse=bool((number + place) % 2)):
            (reply,) = _asked(servers[name], [prefix + tail])
            found[name]["later" if place else "first"].append(reply.pieces[0][0] - reply.began)
            found[name]["texts"].append(_text(reply))
    for name in sorted(servers, reverse=bool(number % 2)):
        replies = _asked(servers[name], [prefix + tail for tail in own[1 + later :]])
        found[name]["burst"] = [reply.pieces[0][0] - reply.began for reply in replies]
        found[name]["texts"] += [_text(reply) for reply in replies]
    return found


def _asked(server: Server, prompts: list[list[int]]) -> list[Reply]:
    how = {"model": server.model, "max_tokens": OUT, "temperature": 0, "ignore_eos": True, "stream": True}
    bodies = [{**how, "prompt": ids} for ids in prompts]
    replies = asyncio.run(ask_all(server.url, "/v1/completions", bodies))
    assert all(reply.is_done for reply in replies), [(reply.status, reply.error, reply.body[:200]) for reply in replies]
    return replies


def _text(reply: Reply) -> str:
    return "".join(choice["text"] for _, event in reply.events() for choice in event["choices"])


if __name__ == "__main__":
    sys.exit(main())
