"""The compiled loops give torch's bits, and whatever a compiler does, matrices are widened."""

import ctypes
import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from garage.kernels import native, quant

COMPILER = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="this machine has no C++ compiler")
SHAPES = ((1, 1), (3, 5), (64, 64), (7, 97), (130, 33), (517, 257))
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("GARAGE_NATIVE", raising=False)
    (real := native.loops_here).cache_clear()
    yield
    real.cache_clear()


def use(monkeypatch, path: Path) -> None:
    loops = ctypes.CDLL(str(path))
    monkeypatch.setattr(native, "loops_here", lambda: loops)
    monkeypatch.setattr(native, "SMALLEST", 0)


def matrices(shape) -> list[quant.Nf4]:
    """A matrix whose scales are quantised; the same with fp32 scales: its own, tiny, infinite, NaN of ones, two ties of bf16."""
    packed = quant.nf4(torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.05)
    scales = quant.nf4_scales(packed)
    nan = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32).expand_as(scales).clone()
    others = (scales, scales * 1e-38, scales * torch.inf, nan, torch.full_like(scales, 1 + 2**-8), torch.full_like(scales, 1 + 3 * 2**-8))
    return [packed, *(packed._replace(scales=other, scale_max=torch.empty(0)) for other in others)]


def faults() -> list[object]:
    """What the compiled loops get wrong."""
    wrong: list[object] = []
    for shape, dtype in ((shape, dtype) for shape in SHAPES for dtype in (torch.float32, torch.bfloat16)):
        for packed in matrices(shape):
            got = native.nf4_dense(packed, (quant._levels(), quant.code_book(CPU)), shape, dtype)
            assert got is not None and got.shape == shape and got.dtype == dtype
            plain = quant.nf4_plain(packed, shape, dtype)
            is_same = torch.equal(torch.signbit(got[plain == 0]), torch.signbit(plain[plain == 0]))
            if not is_same or not torch.equal(got.nan_to_num(7.5), plain.nan_to_num(7.5)):
                wrong.append(("nf4", shape, dtype))
        codes, scale = quant.int8(torch.randn(shape, generator=torch.Generator().manual_seed(1)))
        got = native.int8_dense(codes, scale, dtype)
        assert got is not None
        if not torch.equal(got, (codes * scale[:, None]).to(dtype)):
            wrong.append(("int8", shape, dtype))
    return wrong


@needs_compiler
@pytest.mark.parametrize("flags", [None, ("-mssse3",), ()], ids=["native", "ssse3", "plain"])
def test_every_way_of_looking_up_gives_torchs_bits(flags, monkeypatch) -> None:
    try:
        path = native.compiled(native.SOURCE, native.CHOICES if flags is None else (flags,))
    except subprocess.CalledProcessError:
        pytest.skip(f"the compiler has no {flags}")
    use(monkeypatch, path)
    assert faults() == []


@needs_compiler
@pytest.mark.parametrize("right, wrong", [
    ("table[codes[i / 2] >> 4], out[i + 1] = table[codes[i / 2] & 15]", "table[codes[i / 2] & 15], out[i + 1] = table[codes[i / 2] >> 4]"),
    ("0x7FFF + ((bits >> 16) & 1)", "0x8000"), ("largest[k / SCALES]", "largest[0]"), ("plain(scales[k])", "scales[k]"),
    ("std::memcpy(out + first, last", "std::memcpy(out + first, table"),
], ids=["nibbles", "ties", "largest", "NaN", "last block"])  # fmt: skip
def test_a_wrong_loop_is_seen(right, wrong, tmp_path, monkeypatch) -> None:
    text = native.SOURCE.read_text()
    assert text.count(right) == 1
    source = tmp_path / "twin.cpp"
    source.write_text(text.replace(right, wrong))
    use(monkeypatch, native.compiled(source, (("-O1",),)))
    assert faults() != []


@needs_compiler
def test_threads_change_nothing_and_nothing_is_written_past_the_end(monkeypatch) -> None:
    use(monkeypatch, native.compiled(native.SOURCE))
    (packed, *_), shape = matrices((517, 257)), (517, 257)
    guarded = torch.full((517 * 257 + 64,), 3.0)
    monkeypatch.setattr(torch, "empty", lambda shape, dtype: guarded[: 517 * 257].view(shape))
    outs = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        guarded.fill_(3.0)
        native.nf4_dense(packed, (quant._levels(), quant.code_book(CPU)), shape, torch.float32)
        outs.append(guarded.clone())
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2]) and (guarded[517 * 257 :] == 3).all()


@needs_compiler
def test_what_the_loops_cannot_read_goes_to_torch(monkeypatch) -> None:
    use(monkeypatch, native.compiled(native.SOURCE))
    (packed, *_), tables = matrices((64, 64)), (quant._levels(), quant.code_book(CPU))
    assert native.nf4_dense(packed, tables, (64, 64), torch.float32) is not None
    for other in (packed._replace(codes=packed.codes[:-1]), packed._replace(scales=packed.scales[:-1]),
                  packed._replace(codes=packed.codes.repeat(2)[::2]), packed._replace(offset=packed.offset.double())):  # fmt: skip
        assert native.nf4_dense(other, tables, (64, 64), torch.float32) is None
    assert native.nf4_dense(packed, tables, (64, 64), torch.float16) is None
    codes, scale = quant.int8(torch.ones(64, 32))
    assert native.int8_dense(codes.T, scale, torch.float32) is None
    meta = quant.Nf4(*(part.to("meta") for part in packed))
    assert quant.nf4_dense(meta, (64, 64), torch.bfloat16).is_meta


def widened(caplog) -> list[str]:
    """The log's lines after two matrices were widened, rightly."""
    packed, *_ = matrices((256, 256))
    with caplog.at_level(logging.INFO, logger=native.__name__):
        for _ in range(2):
            got = quant.nf4_dense(packed, (256, 256), torch.bfloat16)
            assert torch.equal(got, quant.nf4_plain(packed, (256, 256), torch.bfloat16))
    return [record.message for record in caplog.records if record.name == native.__name__]


def script(tmp_path: Path, text: str) -> str:
    path = tmp_path / "fake"
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o700)
    return str(path)


@pytest.mark.parametrize("text, said", [
    (None, "there is no C++ compiler"), ("exit 1", "exit status 1"), ("sleep 300 & wait", "timed out"), ("exit 0", "No such file"),
    ('for last; do :; done; case "$*" in *" -o "*) echo rubbish > "$last";; esac', "native/widen-"),
], ids=["none", "fails", "hangs", "writes nothing", "writes rubbish"])  # fmt: skip
def test_a_bad_compiler_means_torch_and_one_line(text, said, tmp_path, monkeypatch, caplog) -> None:
    monkeypatch.setenv("CXX", script(tmp_path, text) if text else str(tmp_path / "absent"))
    monkeypatch.setattr(native, "SECONDS", 1.0)
    start = time.monotonic()
    lines = widened(caplog)
    assert len(lines) == 1 and said in lines[0] and time.monotonic() - start < 10


def test_a_hanging_compilers_children_end_with_it(tmp_path, monkeypatch, caplog) -> None:
    monkeypatch.setenv("CXX", script(tmp_path, f"sleep 300 & echo $! > {tmp_path}/child; wait"))
    monkeypatch.setattr(native, "SECONDS", 0.5)
    widened(caplog)
    child, end = Path("/proc", (tmp_path / "child").read_text().strip(), "stat"), time.monotonic() + 5
    while child.exists() and child.read_text().split()[2] != "Z" and time.monotonic() < end:
        time.sleep(0.05)
    assert not child.exists() or child.read_text().split()[2] == "Z"


def test_a_folder_that_others_may_write_to_is_not_trusted(tmp_path, monkeypatch, caplog) -> None:
    folder = tmp_path / "garage" / "native"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    monkeypatch.setenv("CXX", script(tmp_path, "exit 0"))
    assert "others may write" in widened(caplog)[0]


def test_it_can_be_switched_off(monkeypatch, tmp_path, caplog) -> None:
    monkeypatch.setenv("GARAGE_NATIVE", "0")
    assert widened(caplog) == [] and not (tmp_path / "garage").exists()


@needs_compiler
def test_small_matrices_start_no_compiler(tmp_path) -> None:
    packed, *_ = matrices((8, 8))
    quant.nf4_dense(packed, (8, 8), torch.float32)
    assert not (tmp_path / "garage").exists()
    packed, *_ = matrices((256, 256))
    quant.nf4_dense(packed, (256, 256), torch.float32)
    folder = tmp_path / "garage" / "native"
    assert native.loops_here() is not None and len(list(folder.iterdir())) == 1 and folder.stat().st_mode & 0o777 == 0o700


@needs_compiler
def test_processes_may_compile_at_once(tmp_path) -> None:
    code = "from garage.kernels import native; assert native.loops_here() is not None; print(native.loops_here()._name)"
    start = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    names = {process.communicate(timeout=100)[0].strip() for process in start}
    assert all(process.returncode == 0 for process in start) and len(names) == 1
    assert [str(path) for path in (tmp_path / "garage" / "native").iterdir()] == list(names)


@needs_compiler
def test_another_processor_gets_another_library(tmp_path, monkeypatch) -> None:
    """Two compilers that differ in what they say of the machine stand for two machines with one home."""
    places = set()
    for flag in ("-DMACHINE=1", "-DMACHINE=2"):
        lie = f'case "$*" in *" -dM "*) exec {COMPILER} {flag} "$@";; esac; exec {COMPILER} "$@"'
        monkeypatch.setenv("CXX", script(tmp_path, lie))
        places |= {native.compiled(native.SOURCE, ((),)), native.compiled(native.SOURCE, ((),))}
    assert len(places) == 2
