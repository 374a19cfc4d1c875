"""A loaded model made ready to answer: matrices in the layout of the machine's products, or in few bits, and fewer of them.

On a CPU whose products are compiled, bf16 matrices are laid out anew, and `quantization` makes tiles of 8 or 4 bits; a tied embedding of
bf16 shares its tiles with the head, a narrow head is a copy beside the bf16 embedding. On a GPU int8 and int4 are rows of 8 bits and NF4;
fp8 multiplies in 8 bits.
q, k and v become one matrix, and so do gate and up: the rows of x are then read, and rounded, once. Checkpoints never see any of it and the
family files never hear of it: submodules are replaced.

Limits: for answering. A model whose weights go on moving, or whose linears adapters are put on by name, is not fused.
"""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from garage.core.errors import UserError
from garage.kernels import compiled, dispatch, tiles
from garage.kernels.whole import Form, Whole, can_run
from garage.models.attend import PagedAttend
from garage.models.layers import Angles, Attend, Attention, Block, GatedMLP, Linear, Model
from garage.models.quantize import DirectLinear, HeldFp8, HeldTiles, QuantEmbedding, QuantLinear, TiledLinear, quantised

FP8_BLOCK = 16  # products in fp8 need sides that are multiples


class FusedAttention(nn.Module):
    """`Attention` with its three projections as one."""

    def __init__(self, parts: Attention, qkv_proj: Linear) -> None:
        super().__init__()
        self.layer, self.scale, self.window, self.head_dim = parts.layer, parts.scale, parts.window, parts.head_dim
        self.heads = [proj.out_features // parts.head_dim for proj in (parts.q_proj, parts.k_proj, parts.v_proj)]
        self.qkv_proj, self.o_proj, self.q_norm, self.k_norm = qkv_proj, parts.o_proj, parts.q_norm, parts.k_norm

    def forward(self, x_TD: Tensor, angles: Angles, attend: Attend) -> Tensor:
        q_TNH, k_TMH, v_TMH = self.qkv_proj(x_TD).view(len(x_TD), -1, self.head_dim).split(self.heads, 1)
        q_TNH, k_TMH = self.q_norm.turned(q_TNH, angles), self.k_norm.turned(k_TMH, angles)
        o_TNH = attend(q_TNH, k_TMH, v_TMH, layer=self.layer, scale=self.scale, window=self.window)
        return self.o_proj(o_TNH.flatten(-2))  # type: ignore[no-any-return]


class FusedMLP(nn.Module):
    """`GatedMLP` with gate and up as one."""

    def __init__(self, parts: GatedMLP, gate_up_proj: Linear) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj, self.activation = gate_up_proj, parts.down_proj, parts.activation

    def forward(self, x_TD: Tensor) -> Tensor:
        gate_TF, up_TF = self.gate_up_proj(x_TD).chunk(2, -1)
        return self.down_proj(dispatch.gated(gate_TF, up_TF, activation=self.activation))  # type: ignore[no-any-return]


class WholeBlock(nn.Module):
    """A block that is one call where it can be, and its parts elsewhere."""

    def __init__(self, block: Block, whole: Whole, layer: int) -> None:
        super().__init__()
        self.block, self._whole, self._layer = block, whole, layer

    def forward(self, x_TD: Tensor, angles: Angles, attend: Attend) -> Tensor:
        if not isinstance(attend, PagedAttend) or not can_run(x_TD, attend.keys[self._layer]):
            return self.block(x_TD, angles, attend)  # type: ignore[no-any-return]
        pools = (attend.keys[self._layer], attend.values[self._layer])
        return self._whole.run(x_TD, pools, attend.step(self._layer), angles)


def held(weight: Tensor, quantization: str, *, on_cpu: bool) -> QuantLinear | None:
    """What a matrix is held as (see `lay_out`), or None if it is best as it is."""
    if quantization == "none":
        is_better = on_cpu and weight.dtype == torch.bfloat16 and weight.shape[1] % 2 == 0 and compiled.has_products()
        return TiledLinear(HeldTiles(weight, "bf16")) if is_better else None
    if quantization == "fp8":
        check_fp8(weight.device)
        return DirectLinear(HeldFp8(weight)) if all(side % FP8_BLOCK == 0 for side in weight.shape) else None
    if not on_cpu:
        return quantised(weight, {"int8": "int8", "int4": "nf4"}[quantization])
    return TiledLinear(HeldTiles(weight, "int8" if quantization == "int8" else "int4"))


@torch.no_grad()
def lay_out(model: Model, quantization: str, *, device: str = "") -> Model:
    """Every linear, the head included, as this machine multiplies best; `quantization` is "none", "int8", "int4" or "fp8". `device` is
    where a model without numbers is thought to be.

    Raises:
        UserError: the GPU has no products in fp8.
    """
    embedding = model.model.embed_tokens.weight
    is_tied, on_cpu = model.lm_head.weight is embedding, (device or embedding.device.type) == "cpu"
    for name, module in list(model.named_modules()):
        if type(module) is Linear and (made := held(module.weight.detach(), quantization, on_cpu=on_cpu)) is not None:
            model.set_submodule(name, made)
    head = model.lm_head
    if is_tied and isinstance(head, TiledLinear) and quantization == "none":
        model.model.embed_tokens = QuantEmbedding(head.weight)
    _give_back()
    return model.requires_grad_(False)


def fuse(model: Model) -> Model:
    """One matrix where several have the same input."""
    for number, block in enumerate(model.model.layers):
        assert isinstance(block, Block), block
        for name, module in list(block.named_modules()):
            if isinstance(module, Attention) and (one := _joined([module.q_proj, module.k_proj, module.v_proj])):
                block.set_submodule(name, FusedAttention(module, one))
            elif isinstance(module, GatedMLP) and (one := _joined([module.gate_proj, module.up_proj])):
                block.set_submodule(name, FusedMLP(module, one))
        if (whole := _whole(block)) is not None:
            model.model.layers[number] = WholeBlock(block, whole, number)
        _give_back()
    return model


def _give_back() -> None:
    """Return freed memory to the system: glibc keeps the holes that changed layouts leave, in all up to the size of the model."""
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def check_fp8(device: torch.device) -> None:
    """Refuse a GPU without products in fp8; the CPU has them, slow ones."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise UserError("this GPU has no products in fp8", remedy="it needs sm_89 or newer; take quantization int8 or int4")


def _whole(block: Block) -> Whole | None:
    """The block as one call, or None if a part of it is not compiled."""
    mix, feed = block.self_attn, block.mlp
    if not isinstance(mix, FusedAttention) or not isinstance(feed, FusedMLP):
        return None
    linears, norms = (mix.qkv_proj, mix.o_proj, feed.gate_up_proj, feed.down_proj), (*block.norms, mix.q_norm, mix.k_norm)
    weights = [None if norm is None else norm.weight for norm in norms]
    tiled = [linear for linear in linears if isinstance(linear, TiledLinear) and linear.in_features % tiles.LANES == 0]
    if len(tiled) < len(linears) or mix.head_dim % (2 * tiles.LANES) or any(w is not None and w.dtype != torch.bfloat16 for w in weights):
        return None
    form = Form(
        norms=weights, heads=mix.heads[0], kv_heads=mix.heads[1], head_width=mix.head_dim, window=mix.window, scale=mix.scale,
        eps=mix.q_norm.eps, offset=mix.q_norm.offset, is_gelu=feed.activation != "silu",
    )  # fmt: skip
    return Whole([(linear.weight.tiles, (linear.out_features, linear.in_features)) for linear in tiled], form)


def _joined(parts: Sequence[nn.Module]) -> Linear | None:
    """The linears as one, or None if they are held in a way that cannot be."""
    held = [part.weight for part in parts if isinstance(part, TiledLinear)]
    if len(held) == len(parts):
        has_blocks = all(weight.shape[0] % tiles.LANES == 0 for weight in held)
        return TiledLinear(HeldTiles.joined(held)) if has_blocks else None
    if all(type(part) is Linear for part in parts):
        return Linear.holding(torch.cat([part.weight for part in parts]))  # type: ignore[misc]
    return None
