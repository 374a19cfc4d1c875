"""Which base an adapter belongs to: a short hash of a model directory's contents, taken from a sample in bounded time.

    config:HEX   config.json, but for keys that say how the file was made or which token ends an answer
    weights:HEX  of every tensor its name, dtype and shape and a few pieces of its bytes, whatever files they lie in

Limits: a sample misses a change that touches few numbers only; it tells another model or another tuning, not a forgery.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

from garage.core.artifact import stated
from garage.core.errors import UserError
from garage.core.files import read_object

FACT = "base_hash"
_PIECES, _BYTES, _HEADER = 4, 256, 1 << 27
_ASIDE = ("transformers_version", "_name_or_path", "architectures", "dtype", "torch_dtype", "use_cache", "initializer_range",
          "bos_token_id", "eos_token_id", "pad_token_id")  # fmt: skip


def base_hash(directory: Path) -> str:
    """The hash of a model in the Hub's layout; a UserError if a weight file is damaged."""
    config = {key: value for key, value in read_object(directory / "config.json").items() if key not in _ASIDE}
    tensors = sorted(line for path in directory.glob("*.safetensors") for line in _tensors(path))
    return f"config:{_short(json.dumps(config, sort_keys=True).encode())} weights:{_short(repr(tensors).encode())}"


def check_base(adapter: Path, base: Path) -> None:
    """Refuse a base that is not the one an adapter of ours was trained on; adapters of other origin state none."""
    trained = stated(adapter, FACT)
    if trained and (found := base_hash(base)) != trained:
        parts = [(*was.partition(":"), now.partition(":")[2]) for was, now in zip(trained.split(), found.split(), strict=True)]
        said = " and ".join(f"{what} ({was}, here {now})" for what, _, was, now in parts if was != now)
        remedy = "put back the base it was trained on, or train the adapter again on this one"
        raise UserError(f"{adapter} belongs to another base than {base}: it was trained on other {said}", remedy=remedy)


def _tensors(path: Path) -> list[str]:
    """One line a tensor of a safetensors file."""
    try:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(size, _HEADER)))
            header.pop("__metadata__", None)
            return [f"{name} {about['dtype']} {about['shape']} {_sample(file, 8 + size, about)}" for name, about in header.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged: {error!r}", remedy="download the model again") from error


def _sample(file: BinaryIO, begin: int, about: Mapping[str, Any]) -> str:
    """Pieces of one tensor's bytes, from its beginning to its end."""
    (first, last), pieces = about["data_offsets"], b""
    for piece in range(_PIECES):
        file.seek(begin + first + max(0, last - first - _BYTES) * piece // (_PIECES - 1))
        pieces += file.read(min(_BYTES, last - first))
    return _short(pieces)


def _short(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=6).hexdigest()
