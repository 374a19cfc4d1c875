"""What 8 and 4 bits cost: the embedded model on GSM8K's questions and answers, and the logits of a random 135M shape.

    python bench/serve_quality.py

Held-out loss in nats a token and the share of tokens whose likeliest successor is that of bf16, on the same 100 items; for the random
shape, the relative error of the logits against fp32 (bf16's own beside it), and the bytes of all matrices.
"""

import json
from pathlib import Path

import torch
from record import record
from torch import Tensor
from torch.nn import functional as F

from garage.engine.loading import load
from garage.models.batch import pack
from garage.models.families import build, from_architecture, init_weights
from garage.models.fuse import fuse, lay_out
from garage.models.layers import Model
from garage.models.quantize import HeldTiles
from garage.specs.serve import EngineSpec

DATA = Path(__file__).parents[2] / "shared" / "data" / "gsm8k" / "test.jsonl"
NANO = Path(__file__).parents[1] / "garage" / "assets" / "nano"
BITS = ("none", "int8", "int4")


@torch.inference_mode()
def logits(model: Model, tokens: list[int]) -> Tensor:
    batch = pack([tokens])
    return model.logits(model(batch.tokens_T, batch.positions_T, batch.attend())).float()


def nano() -> dict[str, dict[str, float]]:
    rows = [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()[:100]]
    out, best = {}, []
    for bits in BITS:
        loaded = load(NANO, None, EngineSpec(quantization=bits, dtype="bfloat16"))
        total, count, same = 0.0, 0, 0
        for i, row in enumerate(rows):
            ids = loaded.tokenizer.encode(f"{row['question']}\n{row['answer']}")
            scores = logits(loaded.model, ids)[:-1]
            total += float(F.cross_entropy(scores, torch.tensor(ids[1:]), reduction="sum"))
            likeliest = scores.argmax(-1)
            if bits == "none":
                best.append(likeliest)
            same, count = same + int((likeliest == best[i]).sum()), count + len(ids) - 1
        out[bits] = {"loss": total / count, "same_as_bf16": same / count, "tokens": count}
    return out


def shape() -> dict[str, dict[str, float]]:
    config = from_architecture(
        "qwen3", vocab_size=49152, rope_theta=10000.0, sliding_window=None, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
        num_attention_heads=9, num_key_value_heads=3, head_dim=64, max_position_embeddings=2048, tie_word_embeddings=True,
    )  # fmt: skip
    tokens, exact, out = list(range(5, 69)), torch.empty(0), {}
    for bits in ("fp32", *BITS):
        model = build(config, dtype=torch.float32 if bits == "fp32" else torch.bfloat16)
        init_weights(model, 0)
        if bits == "fp32":
            exact = logits(model, tokens)
            continue
        model = fuse(lay_out(model, bits))
        held = {id(m): sum(t.nbytes for t in m.tiles) for m in model.modules() if isinstance(m, HeldTiles)}
        dense = sum(p.nbytes for p in model.parameters())
        error = (logits(model, tokens) - exact).norm() / exact.norm()
        out[bits] = {"relative_error": float(error), "bytes": sum(held.values()) + dense}
    return out


def main() -> None:
    torch.set_num_threads(2)
    figures = {"nano": nano(), "shape_135m": shape()}
    print(json.dumps(figures, indent=1))
    print(record("serve_quality", "python bench/serve_quality.py", figures))


if __name__ == "__main__":
    main()
