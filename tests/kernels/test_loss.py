"""The chunked loss against its definition: loss and gradients, masked rows, odd chunks, frozen heads, bf16, and a byte budget."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from garage.kernels import dispatch, reference
from garage.kernels.loss import IGNORED, linear_cross_entropy, linear_log_probs


def case(rows=37, width=16, vocab=50, masked=0.4, dtype=torch.float64):
    draw = torch.Generator().manual_seed(rows)
    hidden = torch.randn(rows, width, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(vocab, width, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(0, vocab, (rows,), generator=draw)
    targets[torch.rand(rows, generator=draw) < masked] = IGNORED
    return hidden, weight, targets


CASES = [(200, 0.3, 64), (200, 0.0, 70), (37, 0.4, 8), (37, 0.0, 37), (1, 0.0, 4), (64, 0.9, 3), (12, 1.1, 5), (9, 0.5, None)]


@pytest.mark.parametrize("rows, masked, chunk", CASES)
def test_loss_and_gradients(rows, masked, chunk):
    hidden, weight, targets = case(rows, masked=masked)
    head = linear_cross_entropy(hidden, weight, targets, chunk_rows=chunk)
    expected = reference.linear_cross_entropy(hidden, weight, targets)
    ours, theirs = (torch.autograd.grad(loss / 7, (hidden, weight)) for loss in (head.loss, expected))
    assert head.count == int((targets != IGNORED).sum())
    assert (head.loss - expected).abs() < 1e-11 * expected.detach().clamp(min=1.0)
    assert all((a - b).abs().max() < 1e-12 for a, b in zip(ours, theirs, strict=True))
    right = (hidden @ weight.T).argmax(-1) == targets
    assert int(head.correct) == int(right.sum())


def test_a_masked_row_that_counts_is_seen():
    """The broken twin: were one masked row counted, loss and gradient would differ."""
    hidden, weight, targets = case()
    counted = targets.clone()
    counted[(targets == IGNORED).nonzero()[0]] = 3
    assert abs(linear_cross_entropy(hidden, weight, targets).loss - linear_cross_entropy(hidden, weight, counted).loss) > 0.1


@pytest.mark.parametrize("frozen", ["hidden", "weight", "both"])
def test_frozen_inputs_get_no_gradient(frozen):
    hidden, weight, targets = case()
    expected = torch.autograd.grad(reference.linear_cross_entropy(hidden, weight, targets), (hidden, weight))
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        tensor.requires_grad_(frozen not in (name, "both"))
    loss = linear_cross_entropy(hidden, weight, targets, chunk_rows=8).loss
    assert loss.requires_grad == (frozen != "both")
    if loss.requires_grad:
        loss.backward()
    for tensor, grad in zip((hidden, weight), expected, strict=True):
        assert (tensor.grad is None) == (not tensor.requires_grad)
        assert tensor.grad is None or (tensor.grad - grad).abs().max() < 1e-12


def test_token_log_probs():
    hidden, weight, targets = case()
    ours = linear_log_probs(hidden, weight, targets, chunk_rows=8)
    logp = (hidden @ weight.T).log_softmax(-1)
    expected = torch.where(targets == IGNORED, 0.0, logp.gather(1, targets.clamp(min=0)[:, None]).squeeze(1))
    upstream = torch.randn(len(targets), dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert (ours - expected).abs().max() < 1e-12
    for a, b in zip(*(torch.autograd.grad(out, (hidden, weight), upstream) for out in (ours, expected)), strict=True):
        assert (a - b).abs().max() < 1e-12


@pytest.mark.parametrize("masters", [False, True])
def test_bf16_follows_float64(masters):
    """bf16 rows with a bf16 head or an fp32 master; sums in fp32, so the loss is closer than any one logit."""
    hidden, weight, targets = case(300, 64, 500, dtype=torch.bfloat16)
    hidden, weight = (t.detach().mul(0.3).requires_grad_() for t in (hidden, weight.float() if masters else weight))
    exact = [t.detach().double().requires_grad_() for t in (hidden, weight)]
    head, expected = linear_cross_entropy(hidden, weight, targets, chunk_rows=64), reference.linear_cross_entropy(*exact, targets)
    assert head.loss.dtype == torch.float32 and abs(head.loss - expected) < 2e-3 * expected
    head.loss.backward()
    expected.backward()
    assert weight.grad.dtype == weight.dtype
    for ours, theirs in zip((hidden, weight), exact, strict=True):
        assert torch.nn.functional.cosine_similarity(ours.grad.double().flatten(), theirs.grad.flatten(), dim=0) > 0.9995


def test_confident_rows_keep_their_gradient_in_bf16():
    """At p(target) of 0.99 to 0.9999 what is left of the gradient is small; bf16 must keep its direction and its size."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(200, 64, generator=draw).bfloat16()
    targets = torch.arange(50)
    hidden = (weight[:50] * 0.16 + 0.02 * torch.randn(50, 64, generator=draw)).bfloat16().requires_grad_()
    exact = hidden.detach().double().requires_grad_()
    linear_cross_entropy(hidden, weight, targets).loss.backward()
    loss = reference.linear_cross_entropy(exact, weight.double(), targets)
    loss.backward()
    assert 0.001 < loss / 50 < 0.1
    error = (hidden.grad.double() - exact.grad).norm(dim=1) / exact.grad.norm(dim=1)
    assert error.median() < 0.05


def test_a_second_backward_fails_loudly():
    hidden, weight, targets = case()
    loss = linear_cross_entropy(hidden, weight, targets).loss
    (loss * 2).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        (loss * 2).backward()


class Bytes(TorchDispatchMode):
    """The largest tensor any op returns, in bytes; what lies in the memory of `known` tensors does not count."""

    largest = 0

    def __init__(self, *known):
        super().__init__()
        self._known = {tensor.untyped_storage().data_ptr() for tensor in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self._known:
                self.largest = max(self.largest, tensor.numel() * tensor.itemsize)
        return out


def test_no_logits_of_all_rows():
    """4096 rows, 8192 words: no tensor is larger than a chunk of logits in fp32 (or the head's own gradient); the definition's is."""
    hidden, weight, targets = case(4096, 8, 8192, dtype=torch.float32)
    with Bytes() as ours:
        linear_cross_entropy(hidden, weight, targets, chunk_rows=128).loss.backward()
        linear_log_probs(hidden, weight, targets, chunk_rows=128).sum().backward()
    assert ours.largest <= 128 * 8192 * 4
    with Bytes() as theirs:
        reference.linear_cross_entropy(hidden, weight, targets)
    assert theirs.largest == 4096 * 8192 * 4


@pytest.mark.parametrize("rows", [40, 1000])
@pytest.mark.parametrize("op", ["loss", "log probs"])
def test_a_tied_table_has_one_gradient(op, rows):
    """Two micro-batches through lookup and head: the sum is autograd's; the second of few rows makes nothing as large as the table."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(4096, 64, generator=draw).requires_grad_()
    exact = weight.detach().double().requires_grad_()
    for number in range(2):
        tokens, targets = torch.randint(0, 4096, (2, rows), generator=draw)
        targets[::3] = IGNORED
        wide = exact[tokens] / 4
        (reference.linear_cross_entropy(wide, exact, targets) / 7).backward()
        known = [] if weight.grad is None else [weight.grad]
        with Bytes(weight, *known) as made:
            hidden = (dispatch.lookup(tokens, weight) / 4).bfloat16()
            told = linear_cross_entropy(hidden, weight, targets).loss if op == "loss" else -linear_log_probs(hidden, weight, targets).sum()
            (told / 7).backward()
        if number and rows < 100:
            assert weight.grad is known[0] and made.largest < weight.numel() * 4
    assert (weight.grad - exact.grad).norm() < 0.01 * exact.grad.norm()


def test_a_second_table_is_seen():
    """The broken twin: autograd's own lookup makes a whole gradient for a few rows."""
    weight = torch.randn(4096, 64).requires_grad_()
    weight.grad = torch.zeros_like(weight)
    with Bytes(weight, weight.grad) as made:
        torch.nn.functional.embedding(torch.arange(3), weight).sum().backward()
    assert made.largest == weight.numel() * 4
