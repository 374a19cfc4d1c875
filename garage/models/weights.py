"""Reading and writing Hub directories: config.json and safetensors, one file or shards.

Files are memory-mapped and copied one tensor at a time, so that beside the model itself at most one matrix is in memory. Every
tensor of the model must be there once, with the right shape and finite numbers; every tensor of the files must be used, but for the
other modalities' of a multimodal checkpoint, which are skipped by exact prefix and reported in the log.
Pickled weights (.bin, .pt) are never opened: reading them can run code.
"""

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from garage.core.errors import UserError
from garage.models.bnb import assembled
from garage.models.config import Config
from garage.models.families import Family, config_json, config_of, family_of, place
from garage.models.layers import Model
from garage.models.quantize import HeldNf4, QuantLinear, quantised

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
Hold = Callable[[Tensor], QuantLinear | None]  # the linear that takes the place of that with this matrix, if any
_AGAIN = "download the model again"
_log = logging.getLogger(__name__)


def pick_device(name: str) -> str:
    """`auto` is the GPU when there is one."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device is cuda, but torch sees no GPU", remedy="use device cpu or auto, or install a CUDA build of torch")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def load_model(
    directory: Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu", quantize: str | Hold = ""
) -> Model:
    """The model of a Hub directory. `dtype` defaults to the one config.json states, then to that of the files.

    With `quantize` "nf4" or "int8" the linears of the layers are held in few bits, each quantised as it is read; those that the files
    themselves hold in NF4 stay so. It may also be the function that decides.

    Raises:
        UserError: a file or tensor is missing, damaged, unknown, of the wrong shape or not finite; it is named.
    """
    config = config_of(directory)
    family = family_of(config)
    with torch.device("meta"):
        model = family.model(config)
    wanted = {name: parameter.shape for name, parameter in model.named_parameters()}
    dtype = dtype or _stated_dtype(config)
    hold = partial(quantised, bits=quantize) if isinstance(quantize, str) and quantize else quantize or (lambda weight: None)
    seen: set[str] = set()
    for source, name, tensor in assembled(tensors_of(directory, family)):
        if name in seen:
            raise UserError(f"{source}: tensor {name} occurs twice", remedy=_AGAIN)
        seen.add(name)
        dtype = dtype or tensor.dtype
        if name == "lm_head.weight" and isinstance(tensor, Tensor) and config.tie_word_embeddings:
            tied = tensor
            continue
        _check(name, tensor, wanted.get(name), source)
        if isinstance(tensor, HeldNf4):
            _hold(model, name, tensor.to(device), dtype, quantize)
            continue
        read = _read(name, tensor, dtype, device)
        if _is_linear(name) and (made := hold(read)) is not None:
            model.set_submodule(name.removesuffix(".weight"), made)
        else:
            place(model, name, read.clone() if read is tensor else read)
        del read  # what took its place may be smaller
    if missing := sorted(wanted.keys() - seen):
        raise UserError(f"{directory}: {_some(missing)} missing", remedy=_AGAIN)
    if config.tie_word_embeddings and "lm_head.weight" in seen:
        _check_tied(model.model.embed_tokens.weight, tied, directory)
    model.tie()
    return model


def save_model(model: Model, directory: Path, *, dtype: torch.dtype | None = None, max_shard_bytes: float = 5e9) -> None:
    """Write config.json, generation_config.json (token ids only) and safetensors into `directory`; a tied head is not written.

    `dtype` defaults to that of each weight. Raises a `UserError` if adapters are attached.
    """
    wanted = {name: parameter.detach() for name, parameter in model.named_parameters()}
    if any(isinstance(module, QuantLinear) for module in model.modules()):
        remedy = "load it without quantize, or merge an adapter, which widens them"
        raise UserError("the model's matrices are held in few bits", remedy=remedy)
    if any(".base." in name for name in wanted):
        raise UserError("the model has adapters attached", remedy="merge them first, or write the adapter alone")
    stored = dtype or next(iter(wanted.values())).dtype
    _write_configs(replace(model.config, dtype=str(stored).removeprefix("torch.")), directory)
    shards = _shards(wanted, dtype, max_shard_bytes)
    files = [SINGLE] if len(shards) == 1 else [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for file, names in zip(files, shards, strict=True):
        tensors = {name: wanted[name].to("cpu", dtype or wanted[name].dtype).contiguous() for name in names}
        save_file(tensors, directory / file, {"format": "pt"})
    if len(shards) > 1:
        sizes = [_size(tensor, dtype) for tensor in wanted.values()]
        totals = {"total_parameters": sum(tensor.numel() for tensor in wanted.values()), "total_size": sum(sizes)}
        places = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        _write_json(directory / INDEX, {"metadata": totals, "weight_map": dict(sorted(places.items()))})


def _is_linear(name: str) -> bool:
    return name.startswith("model.layers.") and name.endswith("_proj.weight")


def _hold(model: Model, name: str, held: HeldNf4, dtype: torch.dtype, quantize: str | Hold) -> None:
    if not _is_linear(name) or quantize == "int8":
        asked = f"{name} is in NF4 already" + (f", {quantize} was asked for" if _is_linear(name) else "; only linears of layers may be")
        raise UserError(asked, remedy="use the unquantised checkpoint")
    held.dtype = dtype
    model.set_submodule(name.removesuffix(".weight"), QuantLinear(held))


def _stated_dtype(config: Config) -> torch.dtype | None:
    if config.dtype is not None and config.dtype not in _DTYPES:
        raise UserError(f"config.json: dtype is {config.dtype!r}", remedy=f"use a checkpoint in one of {', '.join(_DTYPES)}")
    return _DTYPES[config.dtype] if config.dtype else None


def tensors_of(directory: Path, family: Family) -> Iterator[tuple[Path, str, Tensor]]:
    """Every text tensor of the directory under our name for it, memory-mapped; what is skipped is logged."""
    skipped = 0
    for path, listed in _files(directory).items():
        for name, tensor in _in_file(path, listed, family.skipped):
            if tensor is None:
                skipped += 1
            else:
                yield path, family.renamed(name), tensor
    if skipped:
        _log.warning("%s: skipped %d tensors of other modalities (%s)", directory, skipped, ", ".join(family.skipped))


def _in_file(path: Path, listed: set[str], skipped: tuple[str, ...]) -> Iterator[tuple[str, Tensor | None]]:
    """The tensors of one file, None for those of other modalities."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            names = file.keys()
            if absent := sorted(listed - set(names)):
                raise UserError(f"{path} lacks {_some(absent)}, which {INDEX} places there", remedy=_AGAIN)
            yield from ((name, None if name.startswith(skipped) else file.get_tensor(name)) for name in names)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is damaged: {error}", remedy=_AGAIN) from error


def _files(directory: Path) -> dict[Path, set[str]]:
    """The safetensors files, each with the tensors that the index places there."""
    if (directory / INDEX).exists():
        return _indexed(directory)
    if (directory / SINGLE).exists():
        return {directory / SINGLE: set()}
    pickles = sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern))
    if pickles:
        remedy = "use the safetensors version of the model, or convert it: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
        raise UserError(f"{directory} holds weights as pickle ({pickles[0]}), which can run code when read", remedy=remedy)
    raise UserError(f"{directory} has neither {SINGLE} nor {INDEX}", remedy="give the directory of a model in Hub layout")


def _indexed(directory: Path) -> dict[Path, set[str]]:
    files: dict[Path, set[str]] = {}
    try:
        for name, file in json.loads((directory / INDEX).read_text(encoding="utf-8"))["weight_map"].items():
            if Path(file).name != file:
                raise UserError(f"{directory / INDEX} points outside its directory: {file!r}", remedy="use another copy of the model")
            files.setdefault(directory / file, set()).add(name)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{directory / INDEX} is damaged: {error!r}", remedy=_AGAIN) from error
    if absent := sorted(path.name for path in files if not path.exists()):
        raise UserError(f"{directory} lacks {_some(absent)}", remedy=_AGAIN)
    return files


def _check(name: str, tensor: Tensor | HeldNf4, shape: torch.Size | None, source: Path) -> None:
    if shape is None:
        raise UserError(f"{source}: tensor {name} has no place in this model", remedy="the files and config.json must belong to one model")
    if tensor.shape != shape:
        found, needed = list(tensor.shape), list(shape)
        raise UserError(f"{source}: {name} is {found}, config.json makes it {needed}", remedy="use this checkpoint's own config.json")
    if tensor.dtype not in _DTYPES.values():
        raise UserError(f"{source}: {name} is {tensor.dtype}", remedy=f"use a checkpoint in one of {', '.join(_DTYPES)}")


def _read(name: str, tensor: Tensor, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """The mapped tensor itself if nothing changes; refused unless every number is finite in the new dtype."""
    out = tensor.to(device, dtype)
    if out.numel() and not all(bound.isfinite() for bound in out.aminmax()):
        raise UserError(f"tensor {name} holds NaN or infinity as {dtype}", remedy=f"{_AGAIN}, or load it in bfloat16 or float32")
    return out


def _check_tied(embedding: Tensor, head: Tensor, directory: Path) -> None:
    same = head.shape == embedding.shape and torch.equal(head.to(embedding.dtype), embedding.detach().cpu())
    if not same:
        remedy = "set tie_word_embeddings to false if the head is meant to be its own matrix"
        raise UserError(f"{directory}: lm_head.weight differs from the embedding, but config.json ties them", remedy=remedy)


def _shards(tensors: dict[str, Tensor], dtype: torch.dtype | None, limit: float) -> list[list[str]]:
    """Names in order, cut where the next tensor would pass the limit."""
    shards: list[list[str]] = [[]]
    room = limit
    for name, tensor in tensors.items():
        if _size(tensor, dtype) > room and shards[-1]:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= _size(tensor, dtype)
    return shards


def _size(tensor: Tensor, dtype: torch.dtype | None) -> int:
    return tensor.numel() * (dtype or tensor.dtype).itemsize


def _write_configs(config: Config, directory: Path) -> None:
    raw = config_json(config)
    _write_json(directory / "config.json", raw)
    ids = {key: raw[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if raw[key] is not None}
    _write_json(directory / "generation_config.json", ids | {"transformers_version": raw["transformers_version"]})


def _write_json(path: Path, raw: object) -> None:
    path.write_text(json.dumps(raw, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
