"""The chunked distillation loss against plain torch in fp64: value, parts and gradients, every divergence, masks, chunks, and bytes."""

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from torch.utils._python_dispatch import TorchDispatchMode

from garage.kernels.distill import Match, compared, distilled
from garage.kernels.loss import IGNORED, linear_cross_entropy


def case(rows=37, vocab=50, masked=0.4, dtype=torch.float64):
    draw = torch.Generator().manual_seed(rows)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)

    targets = torch.randint(0, vocab, (rows,), generator=draw)
    targets[torch.rand(rows, generator=draw) < masked] = IGNORED
    student = [normal(rows, 16).requires_grad_(), normal(vocab, 16).requires_grad_()]
    return *student, normal(rows, 24), normal(vocab, 24) * 0.5, targets


def plainly(hidden, weight, teacher, teacher_weight, targets, match):
    """By torch's own functions, with its autograd."""
    keep = targets != IGNORED
    student, tutor, tau = (hidden @ weight.T)[keep], (teacher @ teacher_weight.T)[keep], match.temperature
    log_q, log_p = log_softmax(student / tau, -1), log_softmax(tutor / tau, -1)
    log_m = ((log_q.exp() + log_p.exp()) / 2).log()

    def kl(of, against):
        return kl_div(against, of, log_target=True, reduction="sum")

    js = (kl(log_p, log_m) + kl(log_q, log_m)) / 2
    divergence = {"forward": kl(log_p, log_q), "reverse": kl(log_q, log_p), "js": js}[match.divergence]
    nll = cross_entropy(student, targets[keep], reduction="sum")
    agreed = (student.argmax(-1) == tutor.argmax(-1)).sum()
    return (1 - match.mix) * nll + match.mix * tau**2 * divergence, nll, divergence, agreed


SIZES = [(200, 0.3, 64), (200, 0.0, 70), (37, 0.0, 37), (130, 0.0, 64), (1, 0.0, 4), (64, 0.9, 3), (9, 0.5, None)]
KINDS = [Match(kind, tau, mix) for kind in ("forward", "reverse", "js") for tau, mix in ((1.0, 0.5), (2.5, 0.9), (0.7, 1.0))]


@pytest.mark.parametrize("match", KINDS, ids=str)
def test_value_and_gradients_for_every_divergence(match):
    for rows, masked, chunk in SIZES:
        hidden, weight, *rest = case(rows, masked=masked)
        ours, theirs = distilled(hidden, weight, *rest, match=match, chunk=chunk), plainly(hidden, weight, *rest, match)
        scale = theirs[0].detach().abs().clamp(min=1.0)
        assert (ours.loss - theirs[0]).abs() < 1e-11 * scale and (ours.nll - theirs[1]).abs() < 1e-11 * scale
        assert (ours.divergence - theirs[2]).abs() < 1e-11 * scale and ours.agreed == theirs[3]
        assert ours.count == int((rest[-1] != IGNORED).sum())
        for a, b in zip(*(torch.autograd.grad(loss / 7, (hidden, weight)) for loss in (ours.loss, theirs[0])), strict=True):
            assert (a - b).abs().max() < 1e-12


@pytest.mark.parametrize("kind", ["forward", "reverse", "js"])
def test_a_gradient_without_its_temperature_is_seen(kind):
    """The broken twin: tau left out of the gradient is far from what torch finds."""
    hidden, weight, *rest = case(64, masked=0.0)
    match = Match(kind, 2.5, 1.0)
    (want,) = torch.autograd.grad(plainly(hidden, weight, *rest, match)[0], hidden)
    slope = compared(hidden @ weight.T, rest[0] @ rest[1].T, match)[1]
    assert (slope @ weight - want).abs().max() < 1e-10 < 0.1 < (slope / match.temperature @ weight - want).abs().max()


@pytest.mark.parametrize("kind", ["forward", "reverse", "js"])
def test_a_copy_of_the_teacher_has_nothing_to_learn_from_it(kind):
    hidden, weight, *_, targets = case(masked=0.2)
    found = distilled(hidden, weight, hidden, weight, targets, match=Match(kind, 2.0, 1.0))
    assert found.divergence.abs() < 1e-12 and found.agreed == found.count
    assert all(grad.abs().max() < 1e-12 for grad in torch.autograd.grad(found.loss, (hidden, weight)))


def test_without_the_teacher_it_is_the_cross_entropy():
    hidden, weight, teacher, teacher_weight, targets = case()
    ours = distilled(hidden, weight, teacher, teacher_weight, targets, match=Match(mix=0.0))
    plain = linear_cross_entropy(hidden, weight, targets)
    assert (ours.loss - plain.loss).abs() < 1e-11 and ours.correct == plain.correct
    for a, b in zip(*(torch.autograd.grad(loss, (hidden, weight)) for loss in (ours.loss, plain.loss)), strict=True):
        assert (a - b).abs().max() < 1e-12


def test_all_masked_is_zero():
    hidden, weight, *rest = case(12, masked=1.1)
    found = distilled(hidden, weight, *rest, match=Match())
    assert found.loss == 0 and found.count == 0
    assert all((grad == 0).all() for grad in torch.autograd.grad(found.loss, (hidden, weight)))


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_frozen_inputs_and_the_teacher_get_no_gradient(frozen):
    hidden, weight, teacher, teacher_weight, targets = case()
    teacher.requires_grad_()
    (hidden if frozen == "hidden" else weight).requires_grad_(False)
    distilled(hidden, weight, teacher, teacher_weight, targets, match=Match()).loss.backward()
    assert teacher.grad is None and (hidden.grad is None) == (frozen == "hidden") and (weight.grad is None) == (frozen == "weight")


def test_bf16_follows_float64():
    hidden, weight, *rest = case(300, 500, dtype=torch.bfloat16)
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight)]
    ours = distilled(hidden, weight, *rest, match=Match("forward", 2.0))
    theirs = plainly(*exact, *(tensor.double() for tensor in rest[:2]), rest[2], Match("forward", 2.0))[0]
    assert abs(ours.loss - theirs) < 5e-3 * theirs
    ours.loss.backward()
    theirs.backward()
    for one, other in zip((hidden, weight), exact, strict=True):
        assert torch.nn.functional.cosine_similarity(one.grad.double().flatten(), other.grad.flatten(), dim=0) > 0.999


class Bytes(TorchDispatchMode):
    """The largest tensor any op returns, in bytes."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            self.largest = max(self.largest, tensor.numel() * tensor.itemsize if torch.is_tensor(tensor) else 0)
        return out


def test_no_logits_of_all_rows():
    hidden, weight, *rest = case(2048, 4096, masked=0.0, dtype=torch.float32)
    with Bytes() as ours:
        distilled(hidden, weight, *rest, match=Match("js"), chunk=128).loss.backward()
    assert ours.largest <= 128 * 4096 * 4
    with Bytes() as theirs:
        plainly(hidden, weight, *rest, Match("js"))
    assert theirs.largest >= 2048 * 4096 * 4
