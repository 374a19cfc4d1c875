"""A few rows times a matrix in few bits, against float64 products with the very numbers its codes stand for."""

import pytest
import torch
from cases import FLOATS, broken, draw

from garage.kernels import quant, triton_gemv

LIMIT = {torch.float32: 2e-6, torch.float16: 1.5e-3, torch.bfloat16: 1e-2}


def check(kernels, bits, rows, shape, dtype):
    weight, x = draw(*shape, scale=0.05), draw(rows, shape[1], dtype=dtype, seed=1)
    if bits == "int8":
        codes, scale = quant.int8(weight)
        ours, exact = kernels.int8(x, codes, scale), codes.double() * scale[:, None].double()
    else:
        packed = quant.nf4(weight)
        ours, exact = kernels.nf4(x, packed, shape[0]), quant.nf4_plain(packed, shape, torch.float32).double()
    right = x.double() @ exact.T
    off = (ours.double() - right).norm() / right.norm()
    assert ours.dtype == dtype and off < LIMIT[dtype], f"off by {off:.2g}"


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bits, rows, shape", [
    ("int8", 1, (33, 300)), ("int8", 16, (16, 7)), ("int8", 5, (1, 512)),
    ("nf4", 1, (33, 320)), ("nf4", 16, (5, 64)), ("nf4", 3, (300, 128)),
])  # fmt: skip
def test_products(bits, rows, shape, dtype):
    check(triton_gemv, bits, rows, shape, dtype)


@pytest.mark.parametrize("bits, old, new", [
    ("int8", "total * scale[:, None]", "total"),
    ("int8", "to(x.dtype), x, total,", "to(x.dtype), x,"),
    ("int8", "column = start + tl", "column = tl"),
    ("nf4", "codes >> 4", "codes & 15"),
    ("nf4", "+ tl.load(offset_ptr)", ""),
    ("nf4", "block // 256", "block // 512"),
    ("nf4", "x_ptr + at + 1", "x_ptr + at"),
])  # fmt: skip
def test_a_broken_product_is_caught(tmp_path, bits, old, new):
    with pytest.raises(AssertionError, match="off by"):
        check(broken(tmp_path, "triton_gemv", old, new), bits, 3, (33, 300) if bits == "int8" else (300, 320), torch.float32)
