"""Cross-entropy of a linear head, chunk by chunk: the T x V logits never exist, but in 16 bits where the head's gradient is larger.

Rows whose target is `IGNORED` are dropped first, so prompt tokens cost no head. Each chunk of rows makes its logits, turns them
into their own gradient in place (softmax minus one-hot) and is multiplied back into d(hidden) and, if the head is trained, added
into d(weight) in fp32. Few rows, whose d(logits) is smaller than d(weight), are added all at once in the backward; otherwise that only
multiplies by the upstream number. This is the idea of Cut Cross-Entropy (arXiv 2411.09009) and Liger (arXiv 2410.10989).

`linear_log_probs` gives the log-probability of each target with gradients per token, for objectives whose weights depend on it
(preferences, reinforcement learning); it computes each chunk again in the backward.

In 16 bits a chunk never becomes fp32: with e = exp(logits - their largest) and t its fp32 row sums, the gradient is (e - t onehot) / t,
and the division is left to the narrow factors of both products. Rows are filled up to a multiple of 64 with zeros, because oneDNN
compiles its 16-bit products anew for every shape. On two Zen 4 cores this takes 0.6 to 0.8 of the time of the fp32 softmax.

Limits: logits are rounded to the dtype of `hidden_TD`, as a head in that dtype rounds them; sums are fp32 (fp64 for fp64). Every
row of the weight takes part in the softmax: pass a slice to leave padded rows out.

Shape suffixes: T packed tokens, R rows that count, D model width, V vocabulary.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from garage.kernels import logits
from garage.kernels.linear import Weight
from garage.kernels.paths import is_fused, path
from garage.kernels.table import gradient_of

IGNORED = -100
CHUNK_BYTES = {"cpu": 32 << 20}  # of logits; more does not fit into the last cache of a CPU
WIDE_CHUNK_BYTES = 268_500_992  # elsewhere 512 rows of Gemma's vocabulary: fewer read the head too often
FILL = 64
PIECE = 4096  # rows of a head whose gradient is added up at once
SLICE = 1 << 24  # numbers of a head in few bits that are widened at once


@dataclass(frozen=True)
class HeadLoss:
    """`loss` is summed over the rows that count (differentiable), `count` is how many, `correct` how many the argmax got right."""

    loss: Tensor
    count: int
    correct: Tensor


def linear_cross_entropy(hidden_TD: Tensor, weight_VD: Weight, targets_T: Tensor, *, chunk_rows: int | None = None) -> HeadLoss:
    """Summed negative log-likelihood of `targets_T`; a target of -100 is not counted. Divide by the whole step's count yourself."""
    hidden_RD, targets_R, _ = counted(hidden_TD, targets_T)
    wants = (torch.is_grad_enabled() and hidden_RD.requires_grad, torch.is_grad_enabled() and weight_VD.requires_grad)
    loss, correct = _SummedLoss.apply(hidden_RD, weight_VD, targets_R, rows_per_chunk(weight_VD, chunk_rows), *wants)  # type: ignore[no-untyped-call]
    return HeadLoss(loss, len(targets_R), correct)


def linear_log_probs(hidden_TD: Tensor, weight_VD: Weight, targets_T: Tensor, *, chunk_rows: int | None = None) -> Tensor:
    """log p(target) of each token, fp32 [T], differentiable; 0 where the target is -100."""
    hidden_RD, targets_R, rows = counted(hidden_TD, targets_T)
    picked_R: Tensor = _LogProbs.apply(hidden_RD, weight_VD, targets_R, rows_per_chunk(weight_VD, chunk_rows))  # type: ignore[no-untyped-call]
    return picked_R if rows is None else picked_R.new_zeros(len(targets_T)).index_copy(0, rows, picked_R)


def counted(hidden_TD: Tensor, targets_T: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """The rows that count and their places, or None if all of them do."""
    if targets_T.is_meta:  # how many count is a matter of values; here, all
        return hidden_TD, targets_T, None
    rows = (targets_T != IGNORED).nonzero().squeeze(1)
    if len(rows) == len(targets_T):
        return hidden_TD, targets_T, None
    return hidden_TD.index_select(0, rows), targets_T[rows], rows


def rows_per_chunk(weight_VD: Weight, chunk_rows: int | None) -> int:
    room = CHUNK_BYTES.get(weight_VD.device.type, WIDE_CHUNK_BYTES)
    rows = chunk_rows or max(FILL, min(1024, room // (2 * weight_VD.shape[0])))
    return -(-rows // FILL) * FILL


def _slices(weight_VD: Weight) -> list[slice]:
    """Rows of a head in few bits that are widened at once; all of a wide one."""
    step = weight_VD.shape[0] if isinstance(weight_VD, Tensor) else max(1, SLICE // weight_VD.shape[1])
    return [slice(first, first + step) for first in range(0, weight_VD.shape[0], step)]


def _rows(weight_VD: Weight, rows: slice, dtype: torch.dtype) -> Tensor:
    return weight_VD[rows] if isinstance(weight_VD, Tensor) else weight_VD.dense(dtype, rows)


def _cast(weight_VD: Weight, dtype: torch.dtype) -> Weight:
    return weight_VD.to(dtype) if isinstance(weight_VD, Tensor) else weight_VD


def _logits(hidden_RD: Tensor, weight_VD: Weight, out_RV: Tensor) -> Tensor:
    """hidden W^T, written to `out_RV`."""
    for part in _slices(weight_VD):
        torch.mm(hidden_RD, _rows(weight_VD, part, hidden_RD.dtype).T, out=out_RV[:, part])
    return out_RV


def _back(slope_RV: Tensor, weight_VD: Weight) -> Tensor:
    """slope W."""
    parts = [slope_RV[:, part] @ _rows(weight_VD, part, slope_RV.dtype) for part in _slices(weight_VD)[:1]]
    for part in _slices(weight_VD)[1:]:
        parts[0].addmm_(slope_RV[:, part], _rows(weight_VD, part, slope_RV.dtype))
    return parts[0]


def _log_softmax(hidden_RD: Tensor, weight_VD: Weight) -> Tensor:
    logits_RV = _logits(hidden_RD, weight_VD, hidden_RD.new_empty(len(hidden_RD), weight_VD.shape[0]))
    return torch.log_softmax(logits_RV, dim=-1, dtype=torch.promote_types(hidden_RD.dtype, torch.float32))


class _Summed:
    """d(weight) of a chunk, added at once."""

    kept_RV = None

    def __init__(self, weight_VD: Weight, wide: torch.dtype) -> None:
        self._sum_VD = torch.zeros(weight_VD.shape, dtype=wide, device=weight_VD.device)

    def add(self, first: int, dlogits_RV: Tensor, factor_RD: Tensor) -> None:
        _add_product(self._sum_VD, dlogits_RV, factor_RD)

    def finish(self, upstream: Tensor | float) -> Tensor:
        return self._sum_VD.mul_(upstream)


class _Kept:
    """d(logits) of few rows, smaller than d(weight), kept until the backward. One product then adds them to the gradient the weight has:
    of a wide head there is a single gradient over all micro-batches, and each goes through it once."""

    def __init__(self, hidden_RD: Tensor, weight_VD: Weight, wide: torch.dtype, *, rows: int) -> None:
        self._weight, self._num = weight_VD, 0
        self.kept_RV = hidden_RD.new_empty(rows, weight_VD.shape[0])
        self._factor_RD = hidden_RD.new_zeros(rows, hidden_RD.shape[1], dtype=wide)

    def add(self, first: int, dlogits_RV: Tensor, factor_RD: Tensor) -> None:
        self._num = first + len(dlogits_RV)
        self._factor_RD[first : self._num] = factor_RD
        place_RV = self.kept_RV[first : self._num]
        if place_RV.data_ptr() != dlogits_RV.data_ptr():
            place_RV.copy_(dlogits_RV)

    def finish(self, upstream: Tensor | float) -> Tensor | None:
        has_VD = gradient_of(self._weight, self._factor_RD.dtype)
        sum_VD = self._factor_RD.new_zeros(self._weight.shape) if has_VD is None else has_VD
        _add_product(sum_VD, self.kept_RV[: self._num], self._factor_RD[: self._num].mul_(upstream))
        return sum_VD if has_VD is None else None


class Head:
    """The head in the dtype of the activations, and its gradients."""

    def __init__(self, hidden_RD: Tensor, weight_VD: Weight, *, trains_hidden: bool, trains_weight: bool) -> None:
        self.weight_VD = _cast(weight_VD, hidden_RD.dtype)
        self._logits: Tensor | None = None
        self._dhidden = torch.empty_like(hidden_RD) if trains_hidden else None
        self._dweight: _Summed | _Kept | None = None
        rows, wide = -(-len(hidden_RD) // FILL) * FILL, torch.promote_types(hidden_RD.dtype, torch.float32)
        if trains_weight and rows * hidden_RD.itemsize < hidden_RD.shape[1] * wide.itemsize:
            self._dweight = _Kept(hidden_RD, weight_VD, wide, rows=rows)
        elif trains_weight:
            self._dweight = _Summed(weight_VD, wide)

    @property
    def is_training(self) -> bool:
        return self._dhidden is not None or self._dweight is not None

    def logits(self, hidden_RD: Tensor, first: int) -> Tensor:
        """Of the chunk that begins at row `first`, in memory that the next chunk uses again unless it is kept."""
        if self._dweight is not None and self._dweight.kept_RV is not None:
            return _logits(hidden_RD, self.weight_VD, self._dweight.kept_RV[first : first + len(hidden_RD)])
        if self._logits is None or len(self._logits) < len(hidden_RD):
            self._logits = hidden_RD.new_empty(len(hidden_RD), self.weight_VD.shape[0])
        return _logits(hidden_RD, self.weight_VD, self._logits[: len(hidden_RD)])

    def add_divided(self, rows: slice, scaled_RV: Tensor, hidden_RD: Tensor, total: Tensor) -> None:
        """`add` for d(logits) times `total` [R, 1], of rows that may be filled up with zeros."""
        if self._dhidden is not None:
            self._dhidden[rows] = _back(scaled_RV, self.weight_VD).div_(total)[: rows.stop - rows.start]
        if self._dweight is not None:
            self._dweight.add(rows.start, scaled_RV, hidden_RD / total)

    def add(self, rows: slice, dlogits_RV: Tensor, hidden_RD: Tensor) -> None:
        dlogits_RV = dlogits_RV.to(hidden_RD.dtype)
        if self._dhidden is not None:
            self._dhidden[rows] = _back(dlogits_RV, self.weight_VD)
        if self._dweight is not None:
            self._dweight.add(rows.start, dlogits_RV, hidden_RD)

    def settled(self) -> "Head":
        """Without what only the forward needs."""
        del self._logits, self.weight_VD
        return self

    def gradients(self, upstream: Tensor | float = 1.0) -> tuple[Tensor | None, Tensor | None]:
        """Of hidden and weight, times `upstream`, in place and so once; the weight's is None if it was added to its `.grad`."""
        if not self.is_training:
            raise RuntimeError("a second backward through the loss of a head")
        dhidden, dweight, self._dhidden, self._dweight = self._dhidden, self._dweight, None, None
        return dhidden if dhidden is None else dhidden.mul_(upstream), dweight if dweight is None else dweight.finish(upstream)


def _add_product(sum_VD: Tensor, dlogits_RV: Tensor, factor_RD: Tensor) -> None:
    """sum += d(logits)^T factor."""
    factor_RD = factor_RD.to(dlogits_RV.dtype)
    if sum_VD.dtype == dlogits_RV.dtype:
        sum_VD.addmm_(dlogits_RV.T, factor_RD)
        return
    step = PIECE if sum_VD.device.type == "cpu" else len(sum_VD)  # widened on the way: let it stay in the cache
    for first in range(0, len(sum_VD), step):
        part = slice(first, first + step)
        sum_VD[part].add_(dlogits_RV[:, part].T @ factor_RD)


def _wide_chunk(head: Head, hidden_RD: Tensor, targets_R: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    """Summed loss and hits of some rows; their gradients go to `head`."""
    logp_RV, target = _log_softmax(hidden_RD[rows], head.weight_VD), targets_R[rows, None]
    picked = logp_RV.gather(1, target)
    hits = (picked >= logp_RV.amax(-1, keepdim=True)).sum()
    if head.is_training:
        head.add(rows, _added(logp_RV.exp_(), target, picked.new_full(picked.shape, -1.0)), hidden_RD[rows])
    return -picked.sum(), hits


def _narrow_chunk(head: Head, hidden_RD: Tensor, targets_R: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    """The same in 16 bits."""
    fill = -(rows.stop - rows.start) % FILL
    hidden, target = F.pad(hidden_RD[rows], (0, 0, 0, fill)), F.pad(targets_R[rows], (0, fill))[:, None]
    logits_RV = head.logits(hidden, rows.start)
    top = logits_RV.amax(-1, keepdim=True)
    picked = logits_RV.gather(1, target)
    e_RV = logits_RV.sub_(top).exp_()
    total = torch.cat([part.sum(-1, keepdim=True, dtype=torch.float32) for part in torch.split(e_RV, FILL)])  # larger sums copy e in fp32
    real = slice(0, rows.stop - rows.start)
    if head.is_training:
        head.add_divided(rows, _added(e_RV, target, -total), hidden, total)
    return (total.log() + top - picked)[real].sum(), (picked >= top)[real].sum()


def _fused_chunk(head: Head, hidden_RD: Tensor, targets_R: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    """The same where one kernel turns the logits into their gradient."""
    logits_RV = head.logits(hidden_RD[rows], rows.start)
    found = path(logits, logits_RV).cross_entropy_(logits_RV, targets_R[rows], scale=1.0 if head.is_training else None)
    if head.is_training:
        head.add(rows, logits_RV, hidden_RD[rows])
    return found.loss_R.sum(), found.is_hit_R.sum()


def _added(x_RV: Tensor, target: Tensor, change: Tensor) -> Tensor:
    """x_RV with `change` [R, 1] added at the targets, in place, in the dtype of `change`: 16 bits would lose a confident target.

    By index: on CPU torch's scatter copies all of x, which costs more than the softmax."""
    places = torch.arange(len(x_RV), device=x_RV.device), target.squeeze(1)
    x_RV[places] = (x_RV.gather(1, target) + change).squeeze(1).to(x_RV.dtype)
    return x_RV


class _SummedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_RD: Tensor, weight_VD: Weight, targets_R: Tensor, chunk: int, *trains: bool) -> tuple[Tensor, Tensor]:
        head = Head(hidden_RD, weight_VD, trains_hidden=trains[0], trains_weight=trains[1])
        wide = torch.promote_types(hidden_RD.dtype, torch.float32)
        loss, correct = torch.zeros((), dtype=wide, device=hidden_RD.device), torch.zeros((), dtype=torch.long, device=hidden_RD.device)
        part = _narrow_chunk if hidden_RD.dtype in (torch.bfloat16, torch.float16) else _wide_chunk
        part = _fused_chunk if is_fused(hidden_RD) else part
        for start in range(0, len(targets_R), chunk):
            nll, hits = part(head, hidden_RD, targets_R, slice(start, min(start + chunk, len(targets_R))))
            loss += nll
            correct += hits
        ctx.head = head.settled()
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *ctx.head.gradients(grads[0]), None, None, None, None


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_RD: Tensor, weight_VD: Weight, targets_R: Tensor, chunk: int) -> Tensor:
        ctx.save_for_backward(hidden_RD, targets_R)
        ctx.chunk, ctx.weight = chunk, weight_VD
        weight_VD = _cast(weight_VD, hidden_RD.dtype)
        pieces = zip(torch.split(hidden_RD, chunk), torch.split(targets_R, chunk), strict=True)
        if is_fused(hidden_RD):
            parts = ((_logits(h, weight_VD, h.new_empty(len(h), weight_VD.shape[0])), t) for h, t in pieces)
            return torch.cat([-path(logits, logits_RV).cross_entropy_(logits_RV, t, scale=None).loss_R for logits_RV, t in parts])
        return torch.cat([_log_softmax(h, weight_VD).gather(1, t[:, None]).squeeze(1) for h, t in pieces])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden_RD, targets_R = ctx.saved_tensors
        head = Head(hidden_RD, ctx.weight, trains_hidden=ctx.needs_input_grad[0], trains_weight=ctx.needs_input_grad[1])
        for start in range(0, len(targets_R), ctx.chunk):
            rows = slice(start, start + ctx.chunk)
            upstream = grads[0][rows, None]
            if is_fused(hidden_RD):
                slope = head.logits(hidden_RD[rows], start)
                path(logits, slope).cross_entropy_(slope, targets_R[rows], scale=-upstream.squeeze(1))
            else:
                slope = _log_softmax(hidden_RD[rows], head.weight_VD).exp_().mul_(-upstream)
                slope = _added(slope, targets_R[rows, None], upstream)
            head.add(rows, slope, hidden_RD[rows])
        return *head.gradients(), None, None
