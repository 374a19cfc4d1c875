"""What a token costs in the sampler: milliseconds of CPU a row, one thread, for vocabularies of 49k and 262k.

    python bench/sampling_cost.py

Random normal logits, flat (deviation 2) and peaked (6), bfloat16 as a model gives them. CPU time of the calling thread, best of seven, so
that other work on the machine does not count. The last figures are the form of a JSON object: compiling, opening a vocabulary, a mask.
"""

import time
from collections.abc import Callable

import numpy as np
import torch
from record import record, typed

from garage.core.types import Sampling
from garage.engine.constrain import Constraint, open_tokenizer, parser
from garage.engine.request import Sequence
from garage.engine.sampler import sample

KINDS = {
    "greedy": Sampling(), "greedy, 5 log-probabilities": Sampling(logprobs=5), "temperature": Sampling(temperature=1.0),
    "top-k 50": Sampling(temperature=1.0, top_k=50), "top-p 0.9": Sampling(temperature=1.0, top_p=0.9),
    "top-k 20, top-p 0.8": Sampling(temperature=0.7, top_k=20, top_p=0.8), "min-p 0.05": Sampling(temperature=1.0, min_p=0.05),
    "typical-p 0.9": Sampling(temperature=1.0, typical_p=0.9),
}  # fmt: skip


def cpu_ms(work: Callable[[], object], times: int = 7) -> float:
    best = float("inf")
    for _ in range(times):
        began = time.thread_time()
        work()
        best = min(best, time.thread_time() - began)
    return best * 1e3


def rows_ms(vocab_size: int, deviation: float, num_rows: int) -> dict[str, float]:
    logits = (torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(0)) * deviation).bfloat16()
    out = {}
    for name, sampling in KINDS.items():
        rows = [(Sequence(str(n), [1] * 9, 4, 99, sampling, n), 9) for n in range(num_rows)]
        with torch.inference_mode():
            out[name] = round(cpu_ms(lambda rows=rows: sample(logits, rows, vocab_size).read()) / num_rows, 3)
    return out


def form_ms(vocab_size: int) -> dict[str, float]:
    words = [b"", *(bytes([n]) for n in range(256)), *(f"{n:x}".encode() for n in range(16, vocab_size - 241))]
    began = time.thread_time()
    tokenizer = open_tokenizer(words, [0], [0], lambda text: [byte + 1 for byte in text.encode()])
    opened = time.thread_time() - began
    schema = '{"type":"object","properties":{"name":{"type":"string"},"age":{"type":"integer"}},"required":["name","age"]}'
    mask, form = np.zeros(-(-vocab_size // 32), np.int32), Constraint(parser(tokenizer, "json", schema), 0)
    tokens = [byte + 1 for byte in b'{"name": "abc']
    form.write_mask(tokens, len(tokens), mask.ctypes.data, mask.nbytes)
    return {
        "open the vocabulary": round(opened * 1e3, 1), "compile": round(cpu_ms(lambda: parser(tokenizer, "json", schema)), 3),
        "mask inside a string": round(cpu_ms(lambda: form.write_mask(tokens, len(tokens), mask.ctypes.data, mask.nbytes)), 4),
    }  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    figures = {}
    for vocab_size, num_rows in ((49_152, 32), (262_144, 8)):
        rows = {f"deviation {deviation:g}": rows_ms(vocab_size, deviation, num_rows) for deviation in (2.0, 6.0)}
        figures[str(vocab_size)] = {"ms a row": rows, "form, ms": form_ms(vocab_size)}
    print(record("sampling_cost", typed(), figures).read_text())


if __name__ == "__main__":
    main()
