"""A Triton kernel may take as many parameters as its launch passes; every other limit holds for it too."""

import importlib.util
from pathlib import Path

import pytest

_spec = importlib.util.spec_from_file_location("shape", Path(__file__).with_name("shape.py"))
assert _spec and _spec.loader
shape = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(shape)
MANY = "def f(a, b, c, d, e, f, g, h): pass\n"


@pytest.mark.parametrize("faults, text", [
    (0, "@triton.jit\n" + MANY), (1, MANY), (1, "@cache\n" + MANY), (1, "@triton.jit\n" + MANY + "    x = 1\n" * 60),
])  # fmt: skip
def test_parameters_of_kernels(tmp_path, faults, text):
    (tmp_path / "garage").mkdir()
    (tmp_path / "garage/a.py").write_text(text.replace("pass\n    x", "\n    x"))
    assert len(shape.length_faults(tmp_path / "garage")) == faults
