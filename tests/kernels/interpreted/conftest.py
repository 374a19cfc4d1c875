"""These cases need an environment of their own: `test_triton.py` starts them, in Triton's interpreter or on a GPU."""

import os

import numpy as np
import pytest
import torch

collect_ignore_glob = [] if "KERNELS_ON" in os.environ else ["*.py"]


if os.environ.get("TRITON_INTERPRET") == "1":
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, tl

    as_triton = InterpreterBuilder.cast_impl

    def cast(self, src, to):
        """A GPU rounds to the nearest bfloat16, the interpreter of Triton 3.6 cuts off."""
        if src.dtype.scalar != tl.float32 or to.scalar != tl.bfloat16:
            return as_triton(self, src, to)
        data = torch.from_numpy(np.array(src.data, dtype=np.float32)).bfloat16().view(torch.uint16).numpy()
        return TensorHandle(data, to.scalar)

    as_numpy = InterpreterBuilder.create_dot

    def dot(self, a, b, *rest):
        """A GPU multiplies bfloat16 as what it is, the interpreter as the integers it is kept in."""
        wide = [cast(self, t, tl.float32) if t.dtype.scalar == tl.bfloat16 else t for t in (a, b)]
        return as_numpy(self, *wide, *rest)

    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = cast, dot


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """`torch.empty` gives NaN, and the largest integer: what a kernel does not write is seen."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
