"""What the serving benches share: models of published shapes with random weights, a server process, and a client that keeps up.

    directory = model_dir("qwen3-135m")                     weights drawn once, kept in CACHE (GARAGE_BENCH_CACHE, else /tmp/garage-bench)
    with served(directory, max_num_seqs=128) as server:     `garage serve` in a process of its own on a free loopback port
        replies = asyncio.run(ask_all(server.url, bodies))

The client speaks HTTP/1.1 over bare sockets and only notes when bytes came in; events are read after the clock has stopped, so that on two
cores the client takes as little as it can from the server beside it. Everything goes to loopback.
"""

import asyncio
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import torch

from garage.models.config import Config
from garage.models.families import build, from_architecture, init_weights, named
from garage.models.weights import save_model
from garage.tokens.chat import template_of

ROOT = Path(__file__).parents[1]
SHARED = Path(os.environ.get("GARAGE_SHARED", ROOT.parent / "shared"))
CACHE = Path(os.environ.get("GARAGE_BENCH_CACHE", Path(tempfile.gettempdir()) / "garage-bench"))
SMOLLM = {"vocab_size": 49_152, "rope_theta": 1e4, "sliding_window": None, "max_position_embeddings": 2048, "tie_word_embeddings": True}
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
             "head_dim": 32},
    "qwen3-135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
                   "num_key_value_heads": 3, "head_dim": 64},
}  # fmt: skip
MODELS = (*SHAPES, "qwen3-0.6b", "gemma3-270m", "gemma3-1b")
END_ID = 2  # <|im_end|>
NANO = ROOT / "garage" / "assets" / "nano"
DRAWN_IDS = range(3, 49_000)
"""Ids of random prompts: in every vocabulary here, and no control tokens."""


def model_dir(name: str) -> Path:
    """A Hub directory of the named shape: random bfloat16 weights, a real tokenizer of 49,152 tokens, ChatML. Made once."""
    place = CACHE / name
    if place.exists():
        return place
    making = CACHE / f"{name}.{os.getpid()}"
    making.mkdir(parents=True)
    shutil.copy(SHARED / "data" / "tokenizers" / "smollm" / "tokenizer.json", making)
    model = build(shape_of(name), dtype=torch.bfloat16)
    init_weights(model, 0)
    if name == "tiny":
        _widen(model)
    save_model(model, making)
    config = json.loads((making / "config.json").read_text())
    (making / "config.json").write_text(json.dumps({**config, "eos_token_id": END_ID}))  # the shape's own may be none of this tokenizer's
    (making / "generation_config.json").unlink(missing_ok=True)
    (making / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}))
    (making / "chat_template.jinja").write_text(template_of("chatml"))
    making.rename(place)
    return place


def random_prompts(count: int, length: int | range, seed: str) -> list[list[int]]:
    """Prompts of random ids; lengths drawn when a range is given."""
    draw = random.Random(seed)
    lengths = [length if isinstance(length, int) else draw.choice(length) for _ in range(count)]
    return [[draw.choice(DRAWN_IDS) for _ in range(each)] for each in lengths]


@dataclass(frozen=True)
class Server:
    """A running `garage serve`; `model` is the name to ask for."""

    url: str
    model: str
    process: subprocess.Popen[str]

    def memory(self) -> int:
        """Bytes the process holds now."""
        return psutil.Process(self.process.pid).memory_info().rss

    def get(self, path: str) -> str:
        with urllib.request.urlopen(self.url + path, timeout=30) as reply:
            return reply.read().decode()

    def metric(self, name: str) -> float:
        """The sum of a Prometheus metric over its labels; the name without our prefix."""
        lines = [line for line in self.get("/metrics").splitlines() if line.startswith(f"garage:{name}")]
        values = [float(line.rsplit(" ", 1)[1]) for line in lines if line[len(f"garage:{name}")] in "{ "]
        assert values, f"/metrics has no garage:{name}"
        return sum(values)


@contextmanager
def served(directory: Path, *, threads: int = 2, log: Path | None = None, flags: Sequence[str] = (), **engine: object) -> Iterator[Server]:
    """`garage serve` on a free port; keywords are fields of its engine."""
    settings = [part for name, value in engine.items() for part in (f"--engine.{name}", str(value).lower())]
    command = [sys.executable, "-m", "garage", "serve", str(directory), "--port", "0", "--served-model-name", "bench", *settings, *flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    with (log or Path(os.devnull)).open("w") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment, cwd=ROOT)
        try:
            assert process.stdout
            line = next((line for line in process.stdout if "http://" in line), None)
            assert line, f"the server did not start; {log or 'give a log to see why'}"
            url = next(word for word in line.split() if word.startswith("http://")).removesuffix("/v1")
            yield Server(url, "bench", process)
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


@dataclass
class Reply:
    """What one request got: the status, the headers, the body as it came in pieces, and when."""

    began: float
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    pieces: list[tuple[float, bytes]] = field(default_factory=list)
    ended: float = 0.0
    error: str = ""

    @property
    def body(self) -> bytes:
        return b"".join(piece for _, piece in self.pieces)

    def events(self) -> list[tuple[float, dict[str, Any]]]:
        """The server-sent events and when the last byte of each came in; without the `[DONE]`."""
        found, rest = [], b""
        for when, piece in self.pieces:
            *whole, rest = (rest + piece).split(b"\n\n")
            found += [(when, json.loads(event[6:])) for event in whole if event.startswith(b"data: {")]
        return found

    @property
    def is_done(self) -> bool:
        return self.body.endswith(b"data: [DONE]\n\n")

    def json(self) -> Any:
        return json.loads(self.body)


async def ask(url: str, path: str, body: Mapping[str, object] | bytes, *, cut_after: int | None = None, timeout: float = 300,
              headers: Mapping[str, str] | None = None) -> Reply:  # fmt: skip
    """Post one request and read its answer; with `cut_after`, vanish after that many pieces of the answer (0: after sending)."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    reply = Reply(time.perf_counter())
    writer: asyncio.StreamWriter | None = None
    try:
        async with asyncio.timeout(timeout):
            reader, writer = await asyncio.open_connection(urlsplit(url).hostname, urlsplit(url).port, limit=1 << 20)
            more = "".join(f"{name}: {value}\r\n" for name, value in {"Content-Type": "application/json", **(headers or {})}.items())
            head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\nContent-Length: {len(raw)}\r\n{more}\r\n"
            writer.write(head.encode() + raw)
            await writer.drain()
            if cut_after != 0:
                await _read(reader, reply, cut_after)
    except TimeoutError:
        reply.error = "timed out"
    except (OSError, asyncio.IncompleteReadError, ValueError) as error:
        reply.error = f"{type(error).__name__}: {error}"
    finally:
        reply.ended = time.perf_counter()
        if writer is not None:
            if cut_after is not None:
                writer.transport.abort()
            writer.close()
    return reply


async def _read(reader: asyncio.StreamReader, reply: Reply, cut_after: int | None) -> None:
    status, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    reply.status = int(status.split()[1])
    reply.headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)}
    if reply.headers.get("transfer-encoding") != "chunked":
        reply.pieces.append((time.perf_counter(), await reader.readexactly(int(reply.headers.get("content-length", 0)))))
        return
    while size := int(await reader.readuntil(b"\r\n"), 16):
        piece = await reader.readexactly(size + 2)
        reply.pieces.append((time.perf_counter(), piece[:-2]))
        if cut_after is not None and len(reply.pieces) >= cut_after:
            return
    await reader.readuntil(b"\r\n")


async def ask_all(url: str, path: str, bodies: Sequence[Mapping[str, object]], *, timeout: float = 300) -> list[Reply]:
    """All at once; the answers in the order of the requests."""
    return await asyncio.gather(*(ask(url, path, body, timeout=timeout) for body in bodies))


def percentiles(values: Sequence[float], digits: int = 4) -> dict[str, float]:
    """The 50th, 90th and 99th percentile and the largest."""
    ordered = sorted(values)
    at = {f"p{p}": ordered[min(len(ordered) - 1, len(ordered) * p // 100)] for p in (50, 90, 99)} | {"max": ordered[-1]}
    return {name: round(value, digits) for name, value in at.items()}


def shape_of(name: str) -> Config:
    """The configuration of a model of MODELS."""
    return from_architecture("qwen3", **SMOLLM, **SHAPES[name]) if name in SHAPES else named(name)


def _widen(model: torch.nn.Module) -> None:
    """Weights wide enough that answers wander over the vocabulary, so that a lost or doubled token is seen."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            size = 0.2 if parameter.ndim == 1 else 1.5 * parameter.shape[1] ** -0.5
            parameter.add_(torch.randn(parameter.shape, generator=draw).to(parameter.dtype), alpha=size)
