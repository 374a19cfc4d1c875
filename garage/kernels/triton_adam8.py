"""`adam8.py` in Triton: widen, update, quantise again and change the weight, in one pass over bytes, gradient and weight.

A block of 256 belongs to one program, so the means are written over themselves. Arithmetic and rounding are those of the torch path, but
for the last bit where torch fuses a product and a sum. A code is found by halving the 255 numbers that lie between the book's.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from garage.kernels.adam8 import Means, Step
from garage.kernels.quant import code_book

GROUP = 4  # blocks a program takes


@triton.jit
def _codes(value, largest, middles_ptr):
    """How many middles lie below value / largest."""
    unit = tl.div_rn(value, tl.where(largest > 0, largest, 1.0)[:, None])
    code = tl.zeros_like(value).to(tl.int32)
    for halving in tl.static_range(8):
        code += tl.where(unit > tl.load(middles_ptr + code + ((128 >> halving) - 1)), 128 >> halving, 0)
    return code


@triton.jit
def _update(
    weight_ptr, grad_ptr, mean_ptr, mean_max_ptr, square_ptr, square_max_ptr, book_ptr, middles_ptr, book2_ptr, middles2_ptr, numel,
    rate, keep, fresh1, beta2, fresh2, unbias, eps, GROUP: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64) * GROUP + tl.arange(0, GROUP)
    real, at = block * 256 < numel, block[:, None] * 256 + tl.arange(0, 256)[None, :]
    mask = at < numel
    grad = tl.load(grad_ptr + at, mask, 0.0).to(tl.float32)
    mean = tl.load(book_ptr + tl.load(mean_ptr + at, mask, 0).to(tl.int32)) * tl.load(mean_max_ptr + block, real, 0.0)[:, None]
    square = tl.load(book2_ptr + tl.load(square_ptr + at, mask, 0).to(tl.int32)) * tl.load(square_max_ptr + block, real, 0.0)[:, None]
    mean = tl.where(mask, tl.fma(grad - mean, fresh1, mean), 0.0)
    square = tl.where(mask, tl.fma(grad * grad, fresh2, square * beta2), 0.0)
    weight = tl.load(weight_ptr + at, mask, 0.0).to(tl.float32)
    step = tl.div_rn(mean, tl.sqrt_rn(tl.div_rn(square, unbias)) + eps) * rate
    tl.store(weight_ptr + at, weight * keep - step, mask)
    mean_max, square_max = tl.max(tl.abs(mean), 1), tl.max(square, 1)
    tl.store(mean_max_ptr + block, mean_max, real)
    tl.store(square_max_ptr + block, square_max, real)
    tl.store(mean_ptr + at, _codes(mean, mean_max, middles_ptr).to(tl.uint8), mask)
    tl.store(square_ptr + at, tl.maximum(_codes(square, square_max, middles2_ptr), 1).to(tl.uint8), mask)


def update(weight: Tensor, grad: Tensor, means: Means, step: Step) -> Means:
    """See `adam8.update`; the means are changed in place."""
    assert weight.is_contiguous() and grad.shape == weight.shape, (weight.stride(), grad.shape)
    numbers = (step.rate, 1 - step.lr * step.decay, 1 - step.beta1, step.beta2, 1 - step.beta2, step.unbias, step.eps)
    device = weight.device
    books = (code_book(device), _middles(device, signed=True), code_book(device, signed=False), _middles(device, signed=False))
    grid = (triton.cdiv(len(means.mean_max), GROUP),)
    _update[grid](weight, grad.contiguous(), *means, *books, weight.numel(), *numbers, GROUP=GROUP, enable_fp_fusion=False)
    return means


@cache
def _middles(device: torch.device, *, signed: bool) -> Tensor:
    book = code_book(device, signed=signed)
    return (book[1:] + book[:-1]) / 2
