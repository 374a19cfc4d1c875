"""Serving on a GPU as a fraction of what the hardware allows: nano-vLLM's 256 requests, decoding at batch 1 and 32, transformers beside it.

The 256 requests are those of nano-vLLM's public bench.py: seed 0, ids and lengths of prompts first, then lengths of answers, each uniform
in 100..1024; ends of sequence are ignored. The floor reads weights and keys and values once a step at `COPY` and multiplies at `PRODUCT`,
what an H200 reaches: every request at once, the prompts at the rate of products, 1,024 steps of decoding. Weights are random, bf16, made
on the GPU.

    python bench/gpu_serve.py floors                                  no GPU: the floors of all sizes
    python bench/gpu_serve.py requests --model qwen3-0.6b             the 256 requests, once to warm up and three times
    python bench/gpu_serve.py decode --model qwen3-0.6b               tokens/s at batch 1 and 32, mean context 1,024
    python bench/gpu_serve.py transformers --model qwen3-0.6b         the 256 requests through its continuous batching (paged SDPA)
    ... --kv fp8, --quantization int8|int4, --eager                   the engine's settings
    ... --smoke                                                       a tiny shape on the CPU; stores nothing

Every piece but `floors` stores bench/results/gpu_serve_PIECE_MODEL[_SETTINGS].json.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from random import Random
from typing import Any

import torch
from record import record, typed

from garage.core.types import Request, Sampling
from garage.engine.engine import Engine
from garage.models.config import Config
from garage.models.families import build, config_json, from_architecture, named
from garage.models.fuse import fuse, lay_out
from garage.models.layers import Model
from garage.specs.serve import EngineSpec
from garage.tokens.tokenizer import Tokenizer

COPY, PRODUCT = 4.3e12, 790e12  # bytes/s read, FLOP/s in bf16
NANO = Path(__file__).parents[1] / "garage" / "assets" / "nano"
SIZES = ("qwen3-0.6b", "qwen3-8b", "gemma3-1b", "gemma3-12b")
MOST_CACHE = 80 << 30
Work = tuple[list[list[int]], list[int]]


def requests(count: int = 256, shortest: int = 100, longest: int = 1024, ids: int = 10_000) -> Work:
    """Prompts and lengths of answers, drawn in nano-vLLM's order."""
    draw = Random(0)
    prompts = [[draw.randint(0, ids) for _ in range(draw.randint(shortest, longest))] for _ in range(count)]
    return prompts, [draw.randint(shortest, longest) for _ in range(count)]


def matrices(c: Config) -> tuple[int, int]:
    """Numbers in the linears of all layers, and in the head."""
    layer = c.hidden_size * c.head_dim * 2 * (c.num_attention_heads + c.num_key_value_heads) + 3 * c.hidden_size * c.intermediate_size
    return c.num_hidden_layers * layer, c.vocab_size * c.hidden_size


def cache_bytes(c: Config, context: int) -> int:
    """Keys and values in bf16 that a token with this context reads."""
    slots = sum(min(context, c.window(layer) or context) for layer in range(c.num_hidden_layers))
    return 4 * c.num_key_value_heads * c.head_dim * slots


def step_floor(c: Config, contexts: list[int]) -> float:
    """Seconds of one step of decoding."""
    numbers = sum(matrices(c))
    return max(2 * numbers / COPY, 2 * numbers * len(contexts) / PRODUCT) + sum(cache_bytes(c, each) for each in contexts) / COPY


def requests_floor(c: Config, work: Work) -> float:
    """Seconds of all requests at once."""
    lengths = [len(prompt) for prompt in work[0]]
    steps = ([n + step for n, out in zip(lengths, work[1], strict=True) if out > step] for step in range(max(work[1])))
    return sum(lengths) * 2 * matrices(c)[0] / PRODUCT + sum(step_floor(c, contexts) for contexts in steps)


def floors() -> list[dict[str, Any]]:
    work = requests()
    sizes = (*SIZES[:2], "qwen3-14b", "gemma3-1b", "gemma3-4b", "gemma3-12b")
    return [{
        "model": name, "requests_tokens_per_s": round(sum(work[1]) / requests_floor(c, work)),
        "decode_tokens_per_s": {batch: round(batch / step_floor(c, [1024] * batch)) for batch in (1, 8, 32, 64, 256)},
        "prefill_tokens_per_s": round(PRODUCT / (2 * matrices(c)[0])),
    } for name, c in ((name, named(name)) for name in sizes)]  # fmt: skip


@torch.no_grad()
def random_model(c: Config, device: str) -> Model:
    model = build(c, dtype=torch.bfloat16, device=device)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        offset = getattr(model.get_submodule(name.removesuffix(".weight")), "offset", 0.0)
        parameter.fill_(1.0 - offset) if parameter.ndim == 1 else parameter.normal_(0.0, 0.02)
    return model.eval().requires_grad_(False)


def engine(c: Config, options: argparse.Namespace, work: Work) -> Engine:
    """Room for all requests at once, as far as the memory goes."""
    tokens = sum(len(prompt) + out + 16 for prompt, out in zip(*work, strict=True))
    room = min(max(4 * c.num_key_value_heads * c.head_dim * c.num_hidden_layers * tokens, 1 << 20), MOST_CACHE)
    longest = max(len(prompt) + out for prompt, out in zip(*work, strict=True))
    settings = EngineSpec(
        max_num_seqs=len(work[0]), max_num_batched_tokens=16_384, max_model_len=longest, kv_cache_bytes=room,
        enable_prefix_caching=False, kv_cache_dtype=options.kv, enforce_eager=options.eager, device=options.device,
    )  # fmt: skip
    model = fuse(lay_out(random_model(c, options.device), options.quantization))
    return Engine(model, Tokenizer.load(NANO), None, settings)


def run(engine: Engine, work: Work) -> float:
    """Seconds from the first submission to the last answer."""
    asked = [
        Request(str(i), tuple(prompt), Sampling(max_tokens=out, temperature=0.6, seed=i, ignore_eos=True))
        for i, (prompt, out) in enumerate(zip(*work, strict=True))
    ]
    began = time.perf_counter()
    done = engine.generate(asked)
    seconds = time.perf_counter() - began
    found = [each.output_tokens for each in done]
    assert found == work[1] and not any(each.error for each in done), [each.error for each in done if each.error][:3]
    return seconds


def measured(c: Config, engine: Engine, work: Work, repeats: int = 3) -> dict[str, Any]:
    run(engine, work)
    seconds, floor = [run(engine, work) for _ in range(repeats)], requests_floor(c, work)
    middle, tokens = statistics.median(seconds), sum(work[1])
    return {
        "requests": len(work[0]), "prompt_tokens": sum(map(len, work[0])), "output_tokens": tokens, "seconds": seconds,
        "tokens_per_s": round(tokens / middle, 1), "floor_tokens_per_s": round(tokens / floor, 1), "share_of_floor": floor / middle,
    }  # fmt: skip


def decode(c: Config, options: argparse.Namespace) -> list[dict[str, Any]]:
    """The prompts' time is taken off: it is that of the same prompts with one token answered."""
    found = []
    before, out = (8, 4) if options.smoke else (960, 128)
    for batch in (1, 2) if options.smoke else (1, 32):
        prompts = [[(7 * i + j) % 100 for j in range(before)] for i in range(batch)]
        one = engine(c, options, (prompts, [out] * batch))
        run(one, (prompts, [out] * batch))
        times = [run(one, (prompts, [out] * batch)) - run(one, (prompts, [1] * batch)) for _ in range(5)]
        per_step, floor = statistics.median(times) / (out - 1), step_floor(c, [before + out // 2] * batch)
        rate = {"tokens_per_s": round(batch / per_step, 1), "floor_tokens_per_s": round(batch / floor, 1)}
        found.append({"batch": batch, "seconds": times, "step_ms": round(1e3 * per_step, 4), **rate, "share_of_floor": floor / per_step})
    return found


def through_transformers(c: Config, options: argparse.Namespace, work: Work) -> dict[str, Any]:
    """Its continuous batching, greedy, with paged SDPA: flash-attn is not installed, and it has no decode path of its own then."""
    import transformers

    raw = config_json(c)
    config = transformers.AutoConfig.for_model(raw.pop("model_type"), **raw)
    with torch.device(options.device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="paged|sdpa").eval()
    seconds = []
    for _ in range(2):
        asked = transformers.GenerationConfig(max_new_tokens=max(work[1]), do_sample=False, eos_token_id=-1, pad_token_id=0)
        began, ended = time.perf_counter(), 0
        with model.continuous_batching_context_manager(generation_config=asked) as manager:
            for i, (prompt, out) in enumerate(zip(*work, strict=True)):
                manager.add_request(prompt, request_id=str(i), max_new_tokens=out)
            while ended < len(work[0]):
                answer = manager.get_result(timeout=5)
                assert answer is not None or manager.is_running(), "transformers stopped"
                ended += answer is not None and answer.is_finished()
        seconds.append(time.perf_counter() - began)
    return {"seconds": seconds, "tokens_per_s": round(sum(work[1]) / seconds[-1], 1), "attention": "paged|sdpa"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("piece", choices=("floors", "requests", "decode", "transformers"))
    parser.add_argument("--model", choices=SIZES, default=SIZES[0])
    parser.add_argument("--kv", choices=("auto", "fp8"), default="auto")
    parser.add_argument("--quantization", choices=("none", "int8", "int4"), default="none")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    options.device = "cpu" if options.smoke else "cuda"
    if options.piece == "floors":
        print(json.dumps(floors(), indent=1))
        return 0
    if not options.smoke and not torch.cuda.is_available():
        sys.exit("This bench measures a GPU and there is none here; --smoke runs a tiny shape on the CPU.")
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    small = {"vocab_size": 512, "rope_theta": 1e4, "sliding_window": None, "head_dim": 32, "max_position_embeddings": 2048}
    c = from_architecture("qwen3", **shape, **small) if options.smoke else named(options.model)
    work = requests(4, 3, 9, 500) if options.smoke else requests()
    pieces = {
        "requests": lambda: measured(c, engine(c, options, work), work), "decode": lambda: decode(c, options),
        "transformers": lambda: through_transformers(c, options, work),
    }  # fmt: skip
    figures = {"model": options.model, "kv": options.kv, "quantization": options.quantization, "eager": options.eager}
    figures["found"] = pieces[options.piece]()
    print(json.dumps(figures, indent=1))
    if not options.smoke:
        settings = [name for name, is_on in (("fp8", options.kv == "fp8"), (options.quantization, options.quantization != "none"),
                                             ("eager", options.eager)) if is_on]  # fmt: skip
        record("_".join(["gpu_serve", options.piece, options.model, *settings]), typed(), figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
