"""Every kernel compiled ahead of time for five generations of GPUs, with the arguments its launcher passes: it fits and spills nothing.

The launchers run on meta tensors of the widest shapes (Gemma 3 27B; Qwen 3 logits), and what they launch is recorded instead of run.
"""

import re
import subprocess
from pathlib import Path

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from garage.kernels import (
    adam8,
    triton_adam8,
    triton_columns,
    triton_gemv,
    triton_logits,
    triton_mlp,
    triton_norm,
    triton_paged,
    triton_quant,
    triton_rope,
)

TOOLS = Path(driver.__file__).parent / "bin"
SHARED = {75: 65_536, 80: 166_912, 89: 101_376, 90: 232_448, 100: 232_448}  # bytes a block may have
EVERYWHERE, OLD_AND_NEW, ONE, DOTS = tuple(SHARED), (75, 90), (90,), (80, 89, 90, 100)
TOKENS, WIDTH, MLP, HEAD, VOCABULARY = 4096, 5376, 21504, 256, 262_208


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def norm(dtype, form=(1e-6, 1.0, False), width=WIDTH):
    x, weight = meta(TOKENS, width, dtype=dtype), meta(width, dtype=dtype)
    triton_norm.normalize(x, weight, *form)
    total, _, rstd = triton_norm.add_normalize(x, x, weight, *form)
    triton_norm.backward(x, total, weight, rstd, form[1], other=x)
    if width != WIDTH or dtype == torch.float32:
        triton_norm.backward(x, total, weight, rstd, form[1], trains_weight=False)


def rope(dtype, form=(1e-6, 0.0, True)):
    x, weight, angles = meta(TOKENS, 16, HEAD, dtype=dtype), meta(HEAD, dtype=dtype), (meta(TOKENS, HEAD // 2, dtype=dtype),) * 2
    triton_rope.turn(x, *angles)
    _, rstd = triton_rope.norm_turn(x, weight, angles, form)
    triton_rope.backward(x, x, weight, rstd, angles, form[1])


def mlp(dtype, activation="gelu_tanh"):
    tensors = [meta(TOKENS, MLP, dtype=dtype) for _ in range(3)]
    triton_mlp.gate(*tensors[:2], activation)
    triton_mlp.slopes(*tensors, activation)


def logits(dtype, softcap=None):
    z, targets = meta(512, VOCABULARY, dtype=dtype), meta(512, dtype=torch.long)
    triton_logits.cross_entropy_(z, targets, scale=1.0, softcap=softcap)
    triton_logits.cross_entropy_(z, targets, scale=None)


def columns(dtype):
    y, gain = meta(TOKENS, WIDTH, dtype=dtype), meta(WIDTH, dtype=torch.float32)
    triton_columns.scale_(y, gain)
    triton_columns.scale_and_sum_(y, y, gain)


def nf4(dtype):
    packed = triton_quant.nf4(meta(WIDTH, MLP, dtype=dtype))
    triton_quant.nf4_dense(packed, (WIDTH, MLP), dtype)
    triton_quant.int8_dense(meta(VOCABULARY, WIDTH, dtype=torch.int8), meta(VOCABULARY, dtype=torch.float32), dtype)


def adam(dtype):
    weight = meta(WIDTH, 64, dtype=dtype)
    triton_adam8.update(weight, weight, adam8.Means.zero(weight), adam8.Step(1e-4, 0.1, 0.9, 0.999, 1e-8, 1.0))


def paged(dtype, pool=None, shape=(32, 16, 128), reads=False):
    """A step of decoding and a prompt, one and many splits, over pages of 16 tokens."""
    heads, kv, width = shape
    keys, contexts = meta(1000, 16, kv, width, dtype=pool or dtype), meta(64, dtype=torch.int64)
    k = meta(64, kv, width, dtype=dtype)
    triton_paged.write(keys, keys, meta(64, dtype=torch.int64), k, k)
    triton_paged.reads_e4m3 = lambda device: reads
    for rows in ((1,), (1,) * 64, (500,)) if dtype == pool == BF16 else ((1, 20),):
        tables = meta(len(rows), 64, dtype=torch.int64)
        triton_paged.attend(meta(sum(rows), heads, width, dtype=dtype), (keys, keys), tables, contexts, rows, scale=1.0, window=512)


def gemv(dtype):
    triton_gemv.int8(meta(1, MLP, dtype=dtype), meta(WIDTH, MLP, dtype=torch.int8), meta(WIDTH, dtype=torch.float32))
    triton_gemv.nf4(meta(16, MLP, dtype=dtype), triton_quant.nf4(meta(WIDTH, MLP, dtype=dtype)), WIDTH)


BF16, FP16, FP32, E4M3 = torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn
CASES = {
    **{f"{f.__name__}-bf16": (lambda f=f: f(BF16), EVERYWHERE) for f in (norm, rope, mlp, logits, columns, nf4)},
    **{f"{f.__name__}-fp16": (lambda f=f: f(FP16), (75,)) for f in (norm, rope, mlp, logits, columns, nf4)},
    "adam8": (lambda: adam(FP32), EVERYWHERE),
    "norm-fp32": (lambda: norm(FP32), OLD_AND_NEW),
    "norm-narrow": (lambda: norm(BF16, (1e-6, 0.0, True), 128), ONE),
    "rope-fp32": (lambda: rope(FP32, (1e-6, 1.0, False)), ONE),
    "mlp-silu": (lambda: mlp(BF16, "silu"), OLD_AND_NEW),
    "paged": (lambda: paged(BF16, BF16), DOTS),
    "paged-wide": (lambda: paged(BF16, shape=(8, 4, 256)), (89, 90)),
    "paged-fp16": (lambda: paged(FP16), ONE),
    "paged-fp32": (lambda: paged(FP32), ONE),
    "paged-bytes": (lambda: paged(BF16, E4M3), (80, 90)),
    "paged-e4m3": (lambda: paged(BF16, E4M3, (8, 4, 256), True), (90, 100)),
    "gemv": (lambda: gemv(BF16), DOTS),
    "gemv-fp32": (lambda: gemv(FP32), ONE),
    "logits-softcap": (lambda: logits(FP32, 30.0), OLD_AND_NEW),
}


def launched(monkeypatch, call):
    """What `call` launches: kernel, arguments, options."""
    calls = []
    with monkeypatch.context() as patch:
        patch.setattr(JITFunction, "run", lambda fn, *args, grid, warmup, **kwargs: calls.append((fn, args, kwargs)))
        call()
    assert calls
    return calls


def compiled(fn, args, kwargs, capability):
    """As the launcher would compile it: its specialisation of the arguments, without a device."""
    target = GPUTarget("cuda", capability, 32)
    backend = make_backend(target)
    kwargs = {"debug": False, **kwargs}
    bound, specialization, options = create_function_from_signature(fn.signature, fn.params, backend)(*args, **kwargs)
    options, signature, constexprs, attrs = fn._pack_args(backend, kwargs, bound, specialization, options)
    return triton.compile(ASTSource(fn, signature, constexprs, attrs), target=target, options=options.__dict__)


def resources(kernel, place):
    """(registers, bytes of stack, loads and stores of spilled numbers)."""
    place.write_bytes(kernel.asm["cubin"])
    said = subprocess.run([TOOLS / "cuobjdump", "--dump-resource-usage", place], capture_output=True, text=True, check=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}
    if kernel.metadata.target.arch != 90:  # a spill takes stack, and reading the code takes as long as making it
        return usage["REG"], usage["STACK"] + usage["LOCAL"], 0
    code = subprocess.run([TOOLS / "nvdisasm", place], capture_output=True, text=True, check=True).stdout
    assert "EXIT" in code and usage["REG"] > 8
    return usage["REG"], usage["STACK"] + usage["LOCAL"], len(re.findall(r"\b(?:STL|LDL)\b", code))


@pytest.mark.parametrize("name", CASES)
def test_it_fits_and_spills_nothing(name, monkeypatch, tmp_path):
    call, capabilities = CASES[name]
    for fn, args, kwargs in launched(monkeypatch, call):
        for capability in capabilities:
            kernel = compiled(fn, args, kwargs, capability)
            registers, stack, spilled = resources(kernel, tmp_path / "cubin")
            what = f"{fn.__name__} for sm_{capability}: {registers} registers, {stack} bytes of stack, {spilled} spills"
            assert kernel.metadata.shared <= SHARED[capability] and not stack and not spilled, what
            is_wide = "v4.b32" in kernel.asm["ptx"] or "cp.async.cg" in kernel.asm["ptx"]  # .cg copies 16 bytes, nothing else
            assert is_wide, f"{what}: no access of 16 bytes"


def test_a_kernel_that_spills_is_seen(monkeypatch, tmp_path):
    """The broken twin: two warps for a row of 8,192 numbers."""
    fn, args, kwargs = launched(monkeypatch, lambda: norm(BF16))[2]
    assert all(resources(compiled(fn, args, {**kwargs, "num_warps": 2}, 90), tmp_path / "cubin")[1:])


@pytest.mark.parametrize("odd", [False, True])
def test_memory_is_read_16_bytes_at_once(odd, monkeypatch):
    """The launcher's divisibility reaches the code; the broken twin has a width that no power of two divides."""
    shape = (meta(TOKENS, WIDTH + odd), meta(WIDTH + odd))
    fn, args, kwargs = launched(monkeypatch, lambda: triton_norm.normalize(*shape, 1e-6, 0.0, True))[0]
    assert ("ld.global.v4" in compiled(fn, args, kwargs, 90).asm["ptx"]) != odd


def test_every_kernel_is_compiled(monkeypatch):
    modules = (
        triton_adam8, triton_columns, triton_gemv, triton_logits, triton_mlp, triton_norm, triton_paged, triton_quant, triton_rope,
    )  # fmt: skip
    kernels = {fn for module in modules for fn in vars(module).values() if isinstance(fn, JITFunction)}
    seen = {fn for call, _ in CASES.values() for fn, _, _ in launched(monkeypatch, call)}
    assert {fn.__name__ for fn in kernels - seen} == {"scaled", "_act", "_capped", "_codes", "_narrow", "_wide"}, "called by kernels"
