"""The CPU's loops in C++, compiled on this machine at the first use: `native/widen.cpp` widens matrices held in few bits, `serve.cpp` and
`product.cpp` are what `compiled` calls.

Why so: torch's ops pass over memory several times, and a wheel with binaries would be one for each processor. A library is kept
in `$XDG_CACHE_HOME/garage/native` (`~/.cache` without) under a hash of source, command and all that the compiler says of itself and of this
processor: a home copied to another machine never runs an instruction that is not there. It is written elsewhere and renamed, so two
processes may compile at once. Nobody else may write to the folder, because what lies there is run.

Limits of widening: contiguous CPU tensors, bf16 and fp32, from `SMALLEST` numbers. Else the torch path works, which gives the same
bits; so it does without a compiler (CXX, or c++, g++, clang++), with one that fails or takes over `SECONDS` (logged once), and with
GARAGE_NATIVE=0.
"""

import ctypes
import hashlib
import logging
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from garage.kernels.paths import is_plain

FOLDER = Path(__file__).with_name("native")
SOURCE, SERVE, PRODUCT, LAYER = (FOLDER / f"{name}.cpp" for name in ("widen", "serve", "product", "layer"))
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=off", "-fPIC", "-shared")
CHOICES = (("-march=native", "-fopenmp"), ("-march=native",), ("-fopenmp",), ())
SECONDS, SMALLEST = 60.0, 1 << 14
CONTRACTED = {SERVE, PRODUCT}  # a product and a sum may be rounded once
_log = logging.getLogger(__name__)


def nf4_dense(packed: Sequence[Tensor], tables: tuple[Tensor, Tensor], shape: tuple[int, int], dtype: torch.dtype) -> Tensor | None:
    """See `quant.nf4_dense`; `tables` are levels and code book. None if the torch path has to do it."""
    (codes, scales, largest, offset), (levels, book), wide = packed, tables, torch.float32
    blocks = -(-shape[0] * shape[1] // 64)
    parts = [(codes, torch.uint8, -(-shape[0] * shape[1] // 2)), (levels, wide, 16)]
    if scales.dtype == wide:
        return _widened("nf4_once", [*parts, (scales, wide, blocks)], shape, dtype)
    parts += [(scales, torch.uint8, blocks), (book, wide, 256), (largest, wide, -(-blocks // 256)), (offset, wide, 1)]
    return _widened("nf4_twice", parts, shape, dtype)


def int8_dense(codes_OI: Tensor, scale_O: Tensor, dtype: torch.dtype) -> Tensor | None:
    """See `quant.int8_dense`; None if the torch path has to do it."""
    parts = [(codes_OI, torch.int8, codes_OI.numel()), (scale_O, torch.float32, len(codes_OI))]
    return _widened("int8_rows", parts, (len(codes_OI), codes_OI[:1].numel()), dtype)


def _widened(loop: str, parts: Sequence[tuple[Tensor, torch.dtype, int]], shape: tuple[int, int], dtype: torch.dtype) -> Tensor | None:
    """`parts` are tensors, the dtypes they must have, and how many numbers at least."""
    fits = all(x.device.type == "cpu" and x.dtype == must and x.is_contiguous() and x.numel() >= n for x, must, n in parts)
    fits = fits and dtype in (torch.bfloat16, torch.float32) and shape[0] * shape[1] >= SMALLEST
    if is_plain() or not fits or (loops := loops_here()) is None:
        return None
    out = torch.empty(shape, dtype=dtype)
    places = [ctypes.c_void_p(x.data_ptr()) for x in (*(part[0] for part in parts), out)]
    getattr(loops, loop)(*places, *map(ctypes.c_int64, shape), int(dtype == torch.bfloat16), torch.get_num_threads())
    return out


@cache
def loops_here(source: Path = SOURCE) -> ctypes.CDLL | None:
    """The loops of this machine, compiled if they are not there yet."""
    if os.environ.get("GARAGE_NATIVE") == "0" or os.name != "posix":
        return None
    try:
        return ctypes.CDLL(str(compiled(source)))
    except (OSError, subprocess.SubprocessError, RuntimeError, ValueError) as error:
        _log.warning("torch does the work of native/%s, more slowly: %s", source.name, error)
        return None


def compiled(source: Path, choices: Sequence[Sequence[str]] = CHOICES) -> Path:
    """The library of `source` in the cache, made with the first flags of `choices` that the compiler can do."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    if not (there := [words for words in map(shlex.split, names) if words and shutil.which(words[0])]):
        raise FileNotFoundError(f"there is no C++ compiler ({', '.join(names)})")
    end = time.monotonic() + SECONDS
    choices = [(*flags, "-ffp-contract=fast") for flags in choices] if source in CONTRACTED else choices
    for flags in choices[:-1]:
        with suppress(subprocess.CalledProcessError):
            return _built(source, [*there[0], *FLAGS, *flags], end)
    return _built(source, [*there[0], *FLAGS, *choices[-1]], end)


def _built(source: Path, command: Sequence[str], end: float) -> Path:
    machine = _run([*command, "-dM", "-E", "-x", "c++", os.devnull], end)
    key = hashlib.sha256(b"\0".join([source.read_bytes(), repr(command).encode(), machine])).hexdigest()
    if not (place := (folder := _folder()) / f"{source.stem}-{key[:32]}.so").exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            _run([*command, str(source), "-o", f"{scratch}/new"], end)
            Path(scratch, "new").rename(place)
    return place


def _folder() -> Path:
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "garage" / "native"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if (found := folder.stat()).st_uid != os.getuid() or found.st_mode & 0o022:
        raise PermissionError(f"others may write to {folder}")
    return folder


def _run(command: Sequence[str], end: float) -> bytes:
    """What `command` prints; it is killed, with all that it started, at `end`."""
    pipe, none = subprocess.PIPE, subprocess.DEVNULL
    with subprocess.Popen(command, stdin=none, stdout=pipe, stderr=none, start_new_session=True) as process:
        try:
            out, _ = process.communicate(timeout=max(0.0, end - time.monotonic()))
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return out
