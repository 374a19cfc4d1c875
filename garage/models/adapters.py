"""Low-rank adapters as wrappers around linears: the model files never hear of them.

- LoRA (arXiv 2106.09685): y = W x + s B A x with s = alpha / r; rsLoRA (arXiv 2312.03732): s = alpha / sqrt(r).
- DoRA (arXiv 2402.09353): y = (m / n) (W x + s B A x), m trained per output row, n the row norms of W + s B A, held constant in the
  backward. n comes from |W|^2 + 2 s rows(W A^T * B) + s^2 rows(B A A^T * B), so B A is never built. It is computed in every forward but
  inside `norms_held`, where the weights do not move (the passes of one step): there once.

W stays frozen and bit-identical, A is Kaiming-uniform, B zero: a new adapter changes nothing. A and B are fp32 whatever W is,
unless bf16 is asked for; magnitudes always are.
Dropout acts on the input of the adapter; with DoRA also on the input of the scaled W, as in PEFT.

Limits: the head and the embedding take no adapter, because the loss reads their weight directly.
Shape suffixes: T packed tokens, I inputs, O outputs, R rank.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from garage.core.errors import UserError
from garage.core.seeds import derive
from garage.kernels import dispatch
from garage.models.config import Config
from garage.models.families import family_of
from garage.models.layers import Linear, Model
from garage.models.quantize import QuantLinear
from garage.models.targets import chosen, refuse_strays
from garage.store.adapter import read_adapter, value_of

ROWS_AT_ONCE = 1 << 18  # numbers widened at once for the row norms: large pieces leave holes in the heap
_PEFT, _LAYERS, _A = "base_model.model.", "model.layers.", ".lora_A.weight"
_REMEDY = "use an adapter that was trained on this model"
_SAME: Mapping[str, Any] = {}


class LoRA(nn.Module):
    """A frozen linear and its low-rank update."""

    def __init__(self, base: Linear, *, rank: int, scale: float, dropout: float = 0.0, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.base = base if isinstance(base, QuantLinear) else base.requires_grad_(False)
        self.scale, self.dropout = scale, dropout
        wide = dtype or torch.promote_types(base.weight.dtype, torch.float32)
        self.lora_A = nn.Parameter(torch.zeros(rank, base.in_features, dtype=wide, device=base.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, dtype=wide, device=base.weight.device))

    def forward(self, x_TI: Tensor) -> Tensor:
        dropped_TI = F.dropout(x_TI, self.dropout) if self.training and self.dropout else None
        return dispatch.low_rank(x_TI, dropped_TI, self.base.weight, self.lora_A, self.lora_B, scale=self.scale)

    def merged(self) -> Tensor:
        """W with the update, in float32 or wider."""
        wide = torch.promote_types(self.lora_A.dtype, torch.float32)
        return torch.addmm(self.base.dense(wide), self.lora_B.to(wide), self.lora_A.to(wide), alpha=self.scale)

    def tensors(self) -> dict[str, nn.Parameter]:
        """The trained parameters under PEFT's names."""
        return {"lora_A.weight": self.lora_A, "lora_B.weight": self.lora_B}


class DoRA(LoRA):
    """LoRA for the direction of each row of W, a trained number for its length."""

    squares_O: Tensor
    are_norms_held = False

    def __init__(self, base: Linear, *, rank: int, scale: float, dropout: float = 0.0, dtype: torch.dtype | None = None) -> None:
        super().__init__(base, rank=rank, scale=scale, dropout=dropout, dtype=dtype)
        squares_O = torch.cat([rows_OI.square().sum(1) for rows_OI in self._base_rows()])
        self.register_buffer("squares_O", squares_O, persistent=False)
        self.lora_magnitude_vector = nn.Parameter(self.squares_O.sqrt())
        self._norms_O: Tensor | None = None

    def forward(self, x_TI: Tensor) -> Tensor:
        is_dropping = self.training and self.dropout
        dropped_TI = F.dropout(x_TI, self.dropout) if is_dropping else x_TI
        adapter = self.lora_A, self.lora_B, self.lora_magnitude_vector, self.row_norms()
        y_TO = dispatch.scaled_low_rank(dropped_TI, self.base.weight, *adapter, scale=self.scale)
        return y_TO + dispatch.linear(x_TI - dropped_TI, self.base.weight) if is_dropping else y_TO

    def merged(self) -> Tensor:
        return super().merged() * (self.lora_magnitude_vector / self.row_norms())[:, None]

    def tensors(self) -> dict[str, nn.Parameter]:
        return super().tensors() | {"lora_magnitude_vector": self.lora_magnitude_vector}

    @torch.no_grad()
    def row_norms(self) -> Tensor:
        """n [out]; from the first call inside `norms_held` if there was one."""
        if self._norms_O is not None:
            return self._norms_O
        a_RI, b_OR, s = self.lora_A.to(self.squares_O.dtype), self.lora_B.to(self.squares_O.dtype), self.scale
        cross_OR = torch.cat([rows_OI @ a_RI.T for rows_OI in self._base_rows()])
        squares_O = self.squares_O + ((2 * s * cross_OR + s * s * (b_OR @ (a_RI @ a_RI.T))) * b_OR).sum(1)
        norms_O = squares_O.clamp(min=torch.finfo(squares_O.dtype).tiny).sqrt()
        self._norms_O = norms_O if self.are_norms_held else None
        return norms_O

    def _base_rows(self) -> Iterator[Tensor]:
        """W in float32 or wider, some rows at a time."""
        weight_OI = self.base.dense(self.base.weight.dtype).detach()
        step = max(1, ROWS_AT_ONCE // weight_OI.shape[1])
        wide = torch.promote_types(torch.promote_types(weight_OI.dtype, self.lora_A.dtype), torch.float32)
        return (rows_OI.to(wide) for rows_OI in torch.split(weight_OI, step))

    def hold_norms(self, held: bool) -> None:
        """Keep the next norms until told otherwise."""
        self.are_norms_held, self._norms_O = held, None


@contextmanager
def norms_held(model: nn.Module) -> Iterator[None]:
    """Inside, each DoRA computes its norms once; no weight may change there."""
    doras = [lora for _, lora in adapters_of(model) if isinstance(lora, DoRA)]
    for dora in doras:
        dora.hold_norms(True)
    try:
        yield
    finally:
        for dora in doras:
            dora.hold_norms(False)


class Kind(TypedDict, total=False):
    """The settings of `adapt` that have a default."""

    dropout: float
    rslora: bool
    dora: bool
    dtype: torch.dtype


def adapt(
    model: Model, *, rank: int, alpha: float, targets: Sequence[str], seed: int,
    rank_pattern: Mapping[str, int] = _SAME, alpha_pattern: Mapping[str, float] = _SAME, **kind: Unpack[Kind],
) -> Model:  # fmt: skip
    """Freeze the model and wrap every linear of its layers that a target names; only the adapters are trainable then.

    Targets are presets, suffixes or full names (`models.targets`); the patterns give some of the linears a rank or alpha of their own.

    Raises:
        UserError: a target or a key of a pattern matches no linear, or a rank is larger than a matrix allows.
    """
    names = chosen(_linears(model), targets, of=type(model).__name__)
    refuse_strays(names, rank_pattern=rank_pattern, alpha_pattern=alpha_pattern)
    ranks = {name: value_of(rank_pattern, name, rank) for name in names}
    for name in names:
        if ranks[name] > (most := min(model.get_submodule(name).weight.shape)):  # type: ignore[arg-type, union-attr]
            remedy = f"use at most {most} there: --adapter.rank_pattern.{name.rpartition('.')[2]} {most}"
            raise UserError(f"rank {ranks[name]} is larger than the smaller dimension of {name}, {most}", remedy=remedy)
    model.requires_grad_(False)
    for name in names:
        lora = _wrap(model, name, rank=ranks[name], alpha=value_of(alpha_pattern, name, alpha), **kind)
        if lora.lora_A.is_meta:
            continue
        draw = torch.Generator().manual_seed(derive(seed, "adapter", name))
        bound = lora.base.in_features**-0.5
        lora.lora_A.data.copy_(torch.empty(lora.lora_A.shape).uniform_(-bound, bound, generator=draw))
    return model


def attach(model: Model, directory: Path) -> Model:
    """Wrap the linears that the PEFT adapter in `directory` was trained on, with its tensors, rank by rank."""
    model.requires_grad_(False)
    places = {name: module for name, module in model.named_modules() if isinstance(module, Linear)}
    for name, lora in read_loras(directory, places, model.config).items():
        model.set_submodule(name, lora)
    return model


def read_loras(directory: Path, linears: Mapping[str, Linear], base: Config) -> dict[str, LoRA]:
    """The PEFT adapter in `directory` over the linears of a model, by their full names; the model does not know of it yet.

    Raises:
        UserError: a file is missing or damaged, or the adapter does not fit these linears; what does not is named.
    """
    config, tensors = read_adapter(directory)
    renamed, loras = our_names(tensors, base), dict[str, LoRA]()
    for name in modules_of(renamed):
        if name not in linears or not name.startswith(_LAYERS):
            raise UserError(f"{directory}: the adapter has tensors for {name}, which is no linear layer of this model", remedy=_REMEDY)
        rank, said = len(renamed[names_of(name)[0]]), config.rank_of(name)
        if rank != said:
            raise UserError(f"{directory}: {name} has rank {rank}, adapter_config.json says {said}", remedy="copy the adapter again")
        kind = Kind(dropout=config.dropout, rslora=config.is_rslora, dora=config.is_dora)
        loras[name] = _over(linears[name], rank=rank, alpha=config.alpha_of(name), **kind)
    _fill(loras, renamed)
    return loras


def our_names(tensors: Mapping[str, Tensor], config: Config) -> dict[str, Tensor]:
    """An adapter's tensors of any origin under the names we write."""
    return {_PEFT + family_of(config).renamed(name.removeprefix(_PEFT)): tensor for name, tensor in tensors.items()}


def modules_of(tensors: Mapping[str, Tensor]) -> list[str]:
    """Full names of the linears that an adapter's tensors are for."""
    return sorted(name.removeprefix(_PEFT).removesuffix(_A) for name in tensors if name.endswith(_A))


def names_of(module: str) -> tuple[str, str]:
    """The names of A and B of one linear in an adapter's file."""
    return f"{_PEFT}{module}{_A}", f"{_PEFT}{module}.lora_B.weight"


def adapters_of(model: nn.Module) -> Iterator[tuple[str, LoRA]]:
    """Every adapter with the name of the linear it is on."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LoRA))


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The trained tensors under PEFT's names, detached."""
    return {f"{_PEFT}{name}.{part}": tensor.detach() for name, lora in adapters_of(model) for part, tensor in lora.tensors().items()}


def load_adapter_tensors(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Fill the adapters of a model.

    Raises:
        UserError: a tensor is missing, left over, or of the wrong shape; it is named.
    """
    _fill(dict(adapters_of(model)), tensors)


@torch.no_grad()
def _fill(loras: Mapping[str, LoRA], tensors: Mapping[str, Tensor]) -> None:
    wanted = {f"{_PEFT}{name}.{part}": tensor for name, lora in loras.items() for part, tensor in lora.tensors().items()}
    for name in sorted(wanted.keys() ^ tensors.keys()):
        raise UserError(f"adapter tensor {name} is {'missing' if name in wanted else 'not part of this adapter'}", remedy=_REMEDY)
    for name, parameter in wanted.items():
        found, needed = list(tensors[name].shape), list(parameter.shape)
        if found != needed:
            raise UserError(f"adapter tensor {name} is {found}, the model needs {needed}", remedy=_REMEDY)
        parameter.copy_(tensors[name])


@torch.no_grad()
def merge(model: Model) -> Model:
    """Add each update to its W (in fp32, then rounded to W's dtype) and drop the wrappers; there is no way back but loading again.

    A W held in few bits is widened first and stays wide.
    """
    for name, lora in list(adapters_of(model)):
        merged = Linear.holding(lora.merged().to(lora.base.weight.dtype))
        model.set_submodule(name, merged)
    return model


def strip(model: Model) -> Model:
    """Drop the wrappers and their updates: every W is as it was."""
    for name, lora in list(adapters_of(model)):
        model.set_submodule(name, lora.base)
    return model


def _wrap(model: Model, name: str, *, rank: int, alpha: float, **kind: Unpack[Kind]) -> LoRA:
    base = model.get_submodule(name)
    assert isinstance(base, Linear), f"{name} is a {type(base).__name__}: one adapter at a time"
    model.set_submodule(name, lora := _over(base, rank=rank, alpha=alpha, **kind))
    return lora


def _over(base: Linear, *, rank: int, alpha: float, **kind: Unpack[Kind]) -> LoRA:
    scale = alpha / (rank**0.5 if kind.get("rslora") else rank)
    return (DoRA if kind.get("dora") else LoRA)(base, rank=rank, scale=scale, dropout=kind.get("dropout", 0.0), dtype=kind.get("dtype"))


def _linears(model: Model) -> list[str]:
    return [f"{_LAYERS}{name}" for name, module in model.model.layers.named_modules() if isinstance(module, Linear)]
