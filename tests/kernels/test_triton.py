"""The Triton kernels, in processes of their own: in the interpreter, compiled ahead of time, and on a GPU if there is one.

Triton reads TRITON_INTERPRET when a kernel is decorated, and an interpreted kernel cannot be compiled: hence a process for each folder.
"""

import os
import subprocess
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
NEW_NUMPY = tuple(map(int, metadata.version("numpy").split(".")[:2])) >= (2, 4)


def run(folder: str, cache: Path, **environment: str) -> None:
    """All tests of a folder; a failure shows what its own pytest says."""
    path = os.pathsep.join(map(str, (HERE / folder, ROOT)))
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON_", "KERNELS_", "PYTEST_"))}
    command = [sys.executable, "-m", "pytest", HERE / folder, "-rf", "--tb=short", "-p", "no:cacheprovider"]
    kept |= {"PYTHONPATH": path, "TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(command, cwd=ROOT, env=kept, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


@pytest.mark.skipif(NEW_NUMPY, reason="the interpreter of triton 3.6 needs numpy < 2.4")
def test_numbers_in_the_interpreter(tmp_path):
    run("interpreted", tmp_path, TRITON_INTERPRET="1", KERNELS_ON="cpu")


@pytest.mark.skipif(sys.platform != "linux", reason="triton brings its tools for Linux alone")
def test_code_ahead_of_time(tmp_path):
    run("compiled", tmp_path, KERNELS_FOR="all")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_numbers_on_a_gpu(tmp_path):
    run("interpreted", tmp_path, KERNELS_ON="cuda")


def test_a_process_without_a_gpu_loads_no_kernels():
    code = """
import sys, torch
from garage.kernels import dispatch
x = torch.randn(4, 8, requires_grad=True)
dispatch.rms_norm(x, torch.ones(8), eps=1e-6, offset=0.0, rounds_first=True).sum().backward()
dispatch.gated(x, x, activation="silu").sum().backward()
print([name for name in sys.modules if name.startswith("garage.kernels.triton_")])
import garage.kernels.triton_norm
print([name for name in sys.modules if name.startswith("garage.kernels.triton_")])
"""
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout
    assert said.split("\n")[:2] == ["[]", "['garage.kernels.triton_norm']"]
