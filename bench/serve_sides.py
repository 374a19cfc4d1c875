"""The sides of bench/serve_throughput.py: one engine each, driven a batch at a time over a pipe.

    python bench/serve_sides.py SIDE DIRECTORY --threads 2        reads one JSON object a line, answers each with one JSON line
    python bench/serve_sides.py gguf DIRECTORY                    writes f16, bf16, q8_0 and q4_0 files beside the weights, for llama.cpp

A line is {"prompts": [[ids]], "outs": [n]}: every prompt is submitted at once, and exactly n tokens are wanted of each. The answer has the
seconds of the whole batch, the first token of each request (whether the sides compute the same model is read from it), and, where the
engine tells, the times to the first token and between tokens. This file imports only what its side needs, because each lives in an
environment of its own: `garage` and `transformers` in ours, `vllm` and `llama` in theirs.

What each side is given: bf16 weights from the same file; both cores; greedy; room for every request at once, so that none waits.
vLLM: its CPU build's advice (tcmalloc and Intel OpenMP preloaded, KV space, threads bound), torch.compile on, no detokenising, engine in
this process. llama.cpp: built for this processor, flash attention on, one unified cache, all sequences in one batch, weights repacked.
"""

import argparse
import atexit
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

MOST, LONGEST, PAGE_TOKENS = 128, 512, 128 * 512
Batch = tuple[Sequence[Sequence[int]], Sequence[int]]
Run = Callable[[Sequence[Sequence[int]], Sequence[int], bool], dict[str, Any]]


def garage(directory: Path, threads: int, quantization: str) -> Run:
    """Our engine, through `generate`; a timed batch goes through `submit` with a listener, as a server does."""
    import torch

    from garage.core.types import Request, Sampling
    from garage.engine.engine import Engine
    from garage.specs.serve import EngineSpec

    torch.set_num_threads(threads)
    settings = {"dtype": "bfloat16", "max_num_seqs": MOST, "max_model_len": LONGEST, "enable_prefix_caching": False, "device": "cpu"}
    settings |= {"num_pages": PAGE_TOKENS // 16} | ({"quantization": quantization} if quantization else {})
    engine = Engine.open(directory, None, EngineSpec.parse(settings))

    def run(prompts: Sequence[Sequence[int]], outs: Sequence[int], is_timed: bool) -> dict[str, Any]:
        wanted = enumerate(zip(prompts, outs, strict=True))
        asked = [Request(str(i), tuple(ids), Sampling(max_tokens=n, ignore_eos=True)) for i, (ids, n) in wanted]
        began = time.perf_counter()
        if not is_timed:
            done = engine.generate(asked)
            seconds = time.perf_counter() - began
            return {"seconds": seconds, "first": [d.token_ids[0] for d in done], "made": sum(len(d.token_ids) for d in done)}
        heard: list[list[float]] = [[] for _ in asked]
        for request in asked:
            engine.submit(request, lambda delta: heard[int(delta.id)].extend([time.perf_counter()] * delta.num_tokens))
        while engine.has_work:
            engine.step()
        gaps = [b - a for times in heard for a, b in pairwise(times)]
        return {"seconds": time.perf_counter() - began, "ttft": [times[0] - began for times in heard], "itl": gaps}

    return run


def vllm(directory: Path, threads: int, _: str) -> Run:
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(directory), dtype="bfloat16", max_model_len=LONGEST, max_num_seqs=MOST, max_num_batched_tokens=2048, skip_tokenizer_init=True,
        enable_prefix_caching=False, disable_log_stats=False, enforce_eager=bool(os.environ.get("VLLM_EAGER")),
    )  # fmt: skip

    def run(prompts: Sequence[Sequence[int]], outs: Sequence[int], is_timed: bool) -> dict[str, Any]:
        how = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True, detokenize=False) for n in outs]
        began = time.perf_counter()
        done = llm.generate([{"prompt_token_ids": list(ids)} for ids in prompts], how, use_tqdm=False)
        result: dict[str, Any] = {"seconds": time.perf_counter() - began, "first": [d.outputs[0].token_ids[0] for d in done]}
        result["made"] = sum(len(d.outputs[0].token_ids) for d in done)
        if is_timed:
            told = [d.metrics for d in done]
            result["ttft"] = [m.first_token_latency for m in told]
            result["itl"] = [(m.last_token_ts - m.first_token_ts) / (m.num_generation_tokens - 1) for m in told]
        return result

    return run


def llama(directory: Path, threads: int, form: str) -> Run:
    """llama.cpp's batch interface: the prompts in chunks, then one batch a step of every sequence that still wants tokens."""
    import llama_cpp as ll
    import numpy as np

    silent = ll.llama_log_callback(lambda *_: None)  # the library keeps a pointer to it
    ll.llama_log_set(silent, None)
    ll.llama_backend_init()
    model = ll.llama_model_load_from_file(str(directory / f"{form}.gguf").encode(), ll.llama_model_default_params())
    vocab = ll.llama_vocab_n_tokens(ll.llama_model_get_vocab(model))
    room, chunk = ll.llama_batch_init(2048, 0, 1), 2048
    contexts: dict[int, Any] = {}

    def context(num: int) -> Any:
        """One context for each number of sequences: attention over a unified cache costs by its size."""
        if num not in contexts:
            for old in contexts.values():
                ll.llama_free(old)
            contexts.clear()
            params = ll.llama_context_default_params()
            params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = num * LONGEST, chunk, 512, num
            params.n_threads = params.n_threads_batch = threads
            params.flash_attn_type, params.kv_unified = 1, True
            contexts[num] = ll.llama_init_from_model(model, params)
        return contexts[num]

    def decode(ctx: Any, rows: list[tuple[int, int, int, bool]]) -> dict[int, int]:
        """Compute rows of (token, position, sequence, wants logits); the likeliest next token of those that want them."""
        room.n_tokens = len(rows)
        for i, (token, place, sequence, wants) in enumerate(rows):
            room.token[i], room.pos[i], room.n_seq_id[i], room.logits[i] = token, place, 1, wants
            room.seq_id[i][0] = sequence
        assert ll.llama_decode(ctx, room) == 0, "llama_decode failed"
        wanted = [(i, row[2]) for i, row in enumerate(rows) if row[3]]
        return {s: int(np.ctypeslib.as_array(ll.llama_get_logits_ith(ctx, i), (vocab,)).argmax()) for i, s in wanted}

    def run(prompts: Sequence[Sequence[int]], outs: Sequence[int], is_timed: bool, _alive: Any = silent) -> dict[str, Any]:
        ctx = context(len(prompts))
        ll.llama_memory_clear(ll.llama_get_memory(ctx), False)
        rows = [(t, at, s, at == len(ids) - 1) for s, ids in enumerate(prompts) for at, t in enumerate(ids)]
        heard: list[list[float]] = [[] for _ in prompts]
        now: dict[int, int] = {}
        began = time.perf_counter()
        for start in range(0, len(rows), chunk):
            fresh = decode(ctx, rows[start : start + chunk])
            now |= fresh
            for s in fresh:
                heard[s].append(time.perf_counter())
        first = [now[s] for s in range(len(prompts))]
        while now := {s: t for s, t in now.items() if len(heard[s]) < outs[s]}:
            now = decode(ctx, [(t, len(prompts[s]) + len(heard[s]) - 1, s, True) for s, t in now.items()])
            for s in now:
                heard[s].append(time.perf_counter())
        result: dict[str, Any] = {"seconds": time.perf_counter() - began, "first": first, "made": sum(map(len, heard))}
        if is_timed:
            result["ttft"] = [times[0] - began for times in heard]
            result["itl"] = [b - a for times in heard for a, b in pairwise(times)]
        return result

    return run


def transformers(directory: Path, threads: int, form: str) -> Run:
    """`generate` on a batch padded on the left, until the longest answer is whole; or its continuous batching."""
    import torch
    from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(str(directory), dtype=torch.bfloat16).eval()
    model.generation_config.eos_token_id = None

    def padded(prompts: Sequence[Sequence[int]], outs: Sequence[int], is_timed: bool) -> dict[str, Any]:
        width = max(map(len, prompts))
        ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
        began = time.perf_counter()
        with torch.inference_mode():
            done = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=max(outs), pad_token_id=0)
        return {"seconds": time.perf_counter() - began, "first": done[:, width].tolist(), "made": sum(outs)}

    def continuous(prompts: Sequence[Sequence[int]], outs: Sequence[int], is_timed: bool) -> dict[str, Any]:
        began = time.perf_counter()
        for i, (ids, n) in enumerate(zip(prompts, outs, strict=True)):
            batching.add_request(list(ids), request_id=str(i), max_new_tokens=n)
        done: dict[int, list[int]] = {}
        while len(done) < len(prompts):
            told = batching.get_result(timeout=600)
            assert told is not None and not told.error, f"continuous batching failed: {told and told.error}"
            if told.is_finished():
                done[int(told.request_id)] = told.generated_tokens
        seconds = time.perf_counter() - began
        return {"seconds": seconds, "first": [done[i][0] for i in range(len(prompts))], "made": sum(map(len, done.values()))}

    if form != "continuous":
        return padded
    settings = ContinuousBatchingConfig(
        page_size=16, num_blocks=PAGE_TOKENS // 16, max_batch_tokens=1024, max_requests_per_batch=MOST, allow_block_sharing=False
    )
    how = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
    batching = model.init_continuous_batching(generation_config=how, continuous_batching_config=settings)
    batching.start()
    atexit.register(batching.stop)
    return continuous


def write_gguf(directory: Path) -> None:
    """The same weights as llama.cpp reads them; its own quantiser makes the 8 and 4 bit files."""
    import ctypes

    import gguf
    import llama_cpp as ll

    for form, kind in (("f16", gguf.LlamaFileType.MOSTLY_F16), ("bf16", gguf.LlamaFileType.MOSTLY_BF16)):
        _gguf(directory, directory / f"{form}.gguf", kind)
    for form, number in (("q8_0", ll.LLAMA_FTYPE_MOSTLY_Q8_0), ("q4_0", ll.LLAMA_FTYPE_MOSTLY_Q4_0)):
        how = ll.llama_model_quantize_default_params()
        how.ftype, how.nthread = number, 2
        files = [str(directory / f"{name}.gguf").encode() for name in ("f16", form)]
        assert ll.llama_model_quantize(*files, ctypes.byref(how)) == 0, f"{form} could not be made"


NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
}  # fmt: skip
QWEN_NORMS = {"post_attention_layernorm": "ffn_norm"}
GEMMA_NORMS = {
    "post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip
WHOLE = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight", "lm_head.weight": "output.weight"}


def _gguf(directory: Path, place: Path, kind: Any) -> None:
    import gguf
    import numpy as np
    from safetensors import safe_open

    raw = json.loads((directory / "config.json").read_text())
    is_gemma = raw["model_type"].startswith("gemma")
    writer = gguf.GGUFWriter(place, "gemma3" if is_gemma else "qwen3")
    writer.add_file_type(kind)
    writer.add_block_count(raw["num_hidden_layers"])
    writer.add_context_length(raw["max_position_embeddings"])
    writer.add_embedding_length(raw["hidden_size"])
    writer.add_feed_forward_length(raw["intermediate_size"])
    writer.add_head_count(raw["num_attention_heads"])
    writer.add_head_count_kv(raw["num_key_value_heads"])
    writer.add_key_length(raw["head_dim"])
    writer.add_value_length(raw["head_dim"])
    writer.add_layer_norm_rms_eps(raw["rms_norm_eps"])
    theta = raw.get("rope_parameters") or {"rope_theta": raw.get("rope_theta")}
    writer.add_rope_freq_base(theta.get("full_attention", theta)["rope_theta"])
    if is_gemma:
        writer.add_sliding_window(raw["sliding_window"])
    writer.add_vocab_size(raw["vocab_size"])
    writer.add_tokenizer_model("none")
    quant = gguf.GGMLQuantizationType.F16 if kind == gguf.LlamaFileType.MOSTLY_F16 else gguf.GGMLQuantizationType.BF16
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            values = file.get_tensor(name).float().numpy()
            if values.ndim == 1:
                writer.add_tensor(_gguf_name(name, is_gemma), (values + 1 if is_gemma else values).astype(np.float32))
            else:
                writer.add_tensor(_gguf_name(name, is_gemma), gguf.quants.quantize(values, quant), raw_dtype=quant)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_name(name: str, is_gemma: bool) -> str:
    if name in WHOLE:
        return WHOLE[name]
    _, _, layer, rest = name.split(".", 3)
    part = rest.removesuffix(".weight")
    return f"blk.{layer}.{ {**NAMES, **(GEMMA_NORMS if is_gemma else QWEN_NORMS)}[part] }.weight"


SIDES: dict[str, tuple[Callable[[Path, int, str], Run], str]] = {
    "garage_bf16": (garage, ""), "garage_int8": (garage, "int8"), "garage_int4": (garage, "int4"), "vllm_bf16": (vllm, ""),
    "llama_bf16": (llama, "bf16"), "llama_f16": (llama, "f16"), "llama_q8_0": (llama, "q8_0"), "llama_q4_0": (llama, "q4_0"),
    "transformers": (transformers, ""), "transformers_continuous": (transformers, "continuous"),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("side", choices=[*SIDES, "gguf"])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    if options.side == "gguf":
        write_gguf(options.directory)
        return
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an engine prints must not end up between the answers
    open_side, form = SIDES[options.side]
    began = time.perf_counter()
    run = open_side(options.directory, options.threads, form)
    print(json.dumps({"ready": time.perf_counter() - began}), file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(run(asked["prompts"], asked["outs"], asked.get("timed", False))), file=answers, flush=True)


if __name__ == "__main__":
    main()
