"""`garage doctor --math`: on this machine, do the ways of computing one thing agree?

A tiny model of each family, random weights, float32. Each check computes the same numbers twice, once as training or serving does it and
once plainly, and says the largest difference of the gradients (or outputs) as a share of their largest entry. A broken kernel, a wrong
driver or a bad memory shows here before it shows in a model.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from garage.core.events import Event, EventLog
from garage.kernels.paths import plainly
from garage.models.adapters import adapt, merge
from garage.models.batch import pack
from garage.models.families import build, from_architecture, init_weights
from garage.models.layers import Linear, Model
from garage.models.quantize import QuantLinear, quantised
from garage.models.recompute import Thrift, recomputed
from garage.models.reference import ReferenceAttend
from garage.specs.train import LINEARS, FitSpec
from garage.store.dataset import Encoded
from garage.train.batches import Batches, Cursor
from garage.train.loop import fit
from garage.train.objectives.likelihood import Likelihood

TOLERANCE = 1e-4
VOCAB, LENGTH = 96, 48
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2}
FAMILIES: Mapping[str, int | None] = {"qwen3": None, "gemma3": 8}  # with its attention window


class _Broken(Exception):
    """A run that is broken off."""


@dataclass(frozen=True)
class Difference:
    """What was compared, the largest difference as a share of the largest entry, and the most it may be."""

    name: str
    largest: float
    allowed: float


def differences(device: str) -> Iterator[Difference]:
    """Every check of every family."""
    for family, window in FAMILIES.items():
        bench = _Bench(family, window, device)
        for name, check in _CHECKS.items():
            torch.manual_seed(0)
            yield Difference(f"{family}: {name}", check(bench), 0.0 if check is _resumed else TOLERANCE)


class _Bench:
    """A family's tiny model and some rows of different lengths."""

    def __init__(self, family: str, window: int | None, device: str) -> None:
        self._family, self._window, self.device = family, window, torch.device(device)
        draw = np.random.default_rng(0)
        self.rows = [draw.integers(0, VOCAB, draw.integers(8, LENGTH)) for _ in range(12)]
        bounds = np.cumsum([0, *map(len, self.rows)])
        learned = np.concatenate([np.arange(len(row)) > 2 for row in self.rows])
        self.data = Encoded(np.concatenate(self.rows).astype("<u4"), learned.astype("u1"), bounds)

    def model(self) -> Model:
        config = from_architecture(
            self._family, vocab_size=VOCAB, rope_theta=1e4, sliding_window=self._window, max_position_embeddings=128, **SHAPE
        )
        model = build(config, device=self.device)
        init_weights(model, 0)
        return model

    def gradients(self, model: Model, **sizes: int) -> list[Tensor]:
        """Of one step over all rows, as training computes it."""
        settings = {"max_length": LENGTH, "batch_tokens": 10_000, "micro_tokens": 10_000} | sizes
        step = next(Batches(self.data, device=self.device, packing=True, **settings).steps(0, Cursor()))
        for micro in step.micros:
            (Likelihood(None).loss(model, micro) / step.learned).backward()  # type: ignore[no-untyped-call]
        return _taken(model)

    def plain_gradients(self, model: Model) -> list[Tensor]:
        """The same row by row: whole softmax, and attention by its definition."""
        total = int(sum(len(row) - 3 for row in self.rows))
        for row in self.rows:
            ids = torch.tensor(row, device=self.device)
            places = torch.arange(len(row) - 1, device=self.device)
            logits = model.logits(model(ids[:-1], places, ReferenceAttend(torch.zeros_like(places), places)))
            (cross_entropy(logits[2:].float(), ids[3:], reduction="sum") / total).backward()  # type: ignore[no-untyped-call]
        return _taken(model)

    def outputs(self, model: Model) -> list[Tensor]:
        batch = pack([row.tolist() for row in self.rows], self.device)
        with torch.no_grad():
            return [model.logits(model(batch.tokens_T, batch.positions_T, batch.attend()))]


def _taken(model: Model) -> list[Tensor]:
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    model.zero_grad(set_to_none=True)
    return gradients


def _apart(some: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    pairs = list(zip(some, others, strict=True))
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-12)) for a, b in pairs)


def _plainly(bench: _Bench) -> float:
    return _apart(bench.gradients(bench.model()), bench.plain_gradients(bench.model()))


def _split(bench: _Bench) -> float:
    return _apart(bench.gradients(bench.model(), micro_tokens=64), bench.gradients(bench.model()))


def _recomputed(bench: _Bench) -> float:
    model = bench.model()
    with recomputed(list(model.model.layers), Thrift()):
        again = bench.gradients(model)
    return _apart(again, bench.gradients(model))


def _tiled(bench: _Bench) -> float:
    model = bench.model()
    with recomputed(list(model.model.layers), Thrift(tile=16)):
        again = bench.gradients(model)
    return _apart(again, bench.gradients(model))


def _adapted(bench: _Bench, **kind: bool) -> Model:
    model = adapt(bench.model(), rank=4, alpha=8.0, targets=LINEARS, seed=0, **kind)  # type: ignore[arg-type]
    for weight in model.parameters():
        if weight.requires_grad:
            nn.init.normal_(weight, std=0.1)
    return model.eval()


def _merged(bench: _Bench) -> float:
    model = _adapted(bench, rslora=True)
    return _apart(bench.outputs(model), bench.outputs(merge(model)))


def _merged_dora(bench: _Bench) -> float:
    model = _adapted(bench, dora=True)
    return _apart(bench.outputs(model), bench.outputs(merge(model)))


def _widened(bench: _Bench) -> float:
    """An adapter over NF4 matrices against the same over the widened ones."""
    found = []
    for is_wide in (False, True):
        model = bench.model()
        for name, module in list(model.model.layers.named_modules()):
            if isinstance(module, Linear):
                held: QuantLinear = quantised(module.weight, "nf4")
                model.model.layers.set_submodule(name, Linear.holding(held.dense(torch.float32)) if is_wide else held)
        found.append(bench.gradients(adapt(model, rank=4, alpha=8.0, targets=LINEARS, seed=0)))
    return _apart(*found)


def _kernels(bench: _Bench) -> float:
    """NF4 under an adapter, by the kernels this machine has and by plain torch."""
    found = []
    for choose in (nullcontext, plainly):
        model = bench.model()
        for name, module in list(model.model.layers.named_modules()):
            if isinstance(module, Linear):
                model.model.layers.set_submodule(name, quantised(module.weight, "nf4"))
        large = quantised(torch.randn(256, 256, generator=torch.Generator().manual_seed(0)).to(bench.device), "nf4")
        with choose():
            slopes = bench.gradients(adapt(model, rank=4, alpha=8.0, targets=LINEARS, seed=0))
            found.append([*slopes, large.dense(torch.float32)])
    return _apart(*found)


def _resumed(bench: _Bench) -> float:
    """Six steps, and six that are broken off after the fourth and taken up: the weights must be the same to the last bit."""
    settings = {"batch_tokens": 64, "micro_tokens": 64, "max_length": LENGTH, "dtype": "float32", "save_every": 3, "eval_every": 0}
    spec, weights = FitSpec.parse(settings | {"max_steps": 6}), []

    def break_off(event: Event) -> None:
        if event.get("step") == 4:
            raise _Broken

    with tempfile.TemporaryDirectory() as place:
        for name, listener in (("whole", None), ("parted", break_off), ("parted", None)):
            model, events = bench.model(), EventLog(None, *([listener] if listener else []))
            with suppress(_Broken):
                fit(model, train=bench.data, held=None, spec=spec, run=Path(place) / name, events=events)
                weights.append([weight.detach() for weight in model.parameters()])
    return _apart(*weights)


_CHECKS: Mapping[str, Callable[[_Bench], float]] = {
    "packed, fused, in chunks = row by row, plainly": _plainly,
    "many passes = one pass": _split,
    "recomputed in the backward = kept": _recomputed,
    "recomputed in tiles = kept": _tiled,
    "merged = wrapped, rsLoRA": _merged,
    "merged = wrapped, DoRA": _merged_dora,
    "over NF4 = over the widened matrix": _widened,
    "kernels = plain torch": _kernels,
    "resumed = never stopped": _resumed,
}
