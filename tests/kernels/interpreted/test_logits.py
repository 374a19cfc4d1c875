"""Logits that become their gradient: loss, logsumexp, hits and gradient against float64, and the chunked loss that is built on it."""

import pytest
import torch
from cases import FLOATS, broken, draw, exact, near

from garage.kernels import dispatch, logits, reference, triton_logits
from garage.kernels.loss import IGNORED, linear_cross_entropy, linear_log_probs


def case(rows, vocabulary, dtype):
    z, targets = draw(rows, vocabulary, dtype=dtype, scale=4.0), torch.randint(0, vocabulary, (rows,)).to(draw(1).device)
    if rows > 1:
        targets[0], targets[1] = z[0].argmax(), vocabulary - 1
        z[1, :-1] = -200.0  # one word has all the mass
    return z, targets


def check(kernels, rows, vocabulary, dtype, *, softcap=None, scale=1.0):
    torch.manual_seed(0)
    z, targets = case(rows, vocabulary, dtype)
    (wide,) = exact(z)
    capped = softcap * torch.tanh(wide / softcap) if softcap else wide
    loss = torch.nn.functional.cross_entropy(capped, targets, reduction="none")
    (slope,) = torch.autograd.grad((loss * scale).sum(), wide)
    for module in (kernels, logits):
        kept = z.clone()
        found = module.cross_entropy_(kept, targets, scale=None, softcap=softcap)
        assert torch.equal(kept, z)
        used = z.clone()
        again = module.cross_entropy_(used, targets, scale=scale, softcap=softcap)
        # The log of a sum is as exact as the largest logit, whose size is not the loss's.
        near(found.loss_R, loss, floor=1e-5 * 20)
        near(found.logsumexp_R, capped.logsumexp(1), floor=1e-5)
        assert torch.equal(found.is_hit_R, capped.gather(1, targets[:, None]).squeeze(1) >= capped.amax(1))
        assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
        near(used, slope, floor=1e-4)
        small = used[:, : min(vocabulary, 50)], slope[:, : min(vocabulary, 50)]
        assert rows < 3 or bool(((small[0].double() - small[1])[2:].abs() <= 0.02 * small[1][2:].abs() + 1e-7).all())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows, vocabulary", [(1, 1), (3, 7), (4, 1000), (3, 4096), (3, 9001), (0, 10)])
def test_cross_entropy(rows, vocabulary, dtype):
    check(triton_logits, rows, vocabulary, dtype)


def test_softcap_and_weights():
    check(triton_logits, 4, 5000, torch.bfloat16, softcap=8.0, scale=0.125)
    check(triton_logits, 4, 777, torch.float32, softcap=30.0)
    check(triton_logits, 4, 777, torch.float32, scale=draw(4, seed=5))


def test_words_that_are_ruled_out():
    """Minus infinity in a whole block, as masked words have it."""
    z, targets = draw(2, 9000), torch.tensor([5000, 8999], device=draw(1).device)
    z[:, :4096] = -torch.inf
    found = triton_logits.cross_entropy_(used := z.clone(), targets, scale=1.0)
    near(found.loss_R, torch.nn.functional.cross_entropy(z.double(), targets, reduction="none"))
    assert used.isfinite().all() and used[:, :4096].abs().max() == 0


@pytest.mark.parametrize(
    "old, new",
    [
        ("column == target, 1.0", "column == target + 1, 1.0"),
        ("total * tl.exp(top - higher)", "total"),
        ('z = tl.where(column < vocabulary, z, float("-inf"))', ""),
        ("picked >= top", "picked < top"),
        ("(z / softcap) * (z / softcap)", "(z / softcap)"),
    ],
)
def test_a_broken_loss_is_caught(tmp_path, old, new):
    with pytest.raises(AssertionError):
        check(broken(tmp_path, "triton_logits", old, new), 4, 5000, torch.bfloat16, softcap=8.0)


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_chunked_loss(dtype, monkeypatch):
    """Through the loss that training calls, with masked rows and a last chunk that is not full."""
    monkeypatch.setattr(dispatch, "is_fused", lambda x: x.dtype != torch.float64)
    hidden, weight = draw(150, 24, dtype=dtype), draw(70, 24, dtype=dtype, seed=1)
    targets = torch.randint(0, 70, (150,), generator=torch.Generator().manual_seed(1)).to(hidden.device)
    targets[::3] = IGNORED
    wide = exact(hidden, weight)
    loss = reference.linear_cross_entropy(*wide, targets)
    inputs = [t.requires_grad_() for t in (hidden, weight)]
    head = linear_cross_entropy(*inputs, targets, chunk_rows=64)
    assert abs(head.loss - loss) < (2e-3 if dtype != torch.float32 else 1e-6) * loss
    assert abs(int(head.correct) - int(((wide[0] @ wide[1].T).argmax(1) == targets).sum())) <= (2 if dtype != torch.float32 else 0)
    for a, b in zip(torch.autograd.grad(head.loss, inputs), torch.autograd.grad(loss, wide), strict=True):
        assert (a.double() - b).norm() < (0.02 if dtype != torch.float32 else 1e-5) * b.norm()


@pytest.mark.parametrize("dtype", FLOATS)
def test_log_probs(dtype, monkeypatch):
    """Each token with a weight of its own, as preferences and reinforcement learning have it."""
    monkeypatch.setattr(dispatch, "is_fused", lambda x: x.dtype != torch.float64)
    hidden, weight, upstream = draw(90, 24, dtype=dtype), draw(70, 24, dtype=dtype, seed=1), draw(90, seed=2)
    targets = torch.randint(0, 70, (90,), generator=torch.Generator().manual_seed(1)).to(hidden.device)
    wide = exact(hidden, weight)
    expected = (wide[0] @ wide[1].T).log_softmax(1).gather(1, targets[:, None]).squeeze(1)
    inputs = [t.requires_grad_() for t in (hidden, weight)]
    ours = linear_log_probs(*inputs, targets, chunk_rows=64)
    assert (ours - expected).abs().max() < {torch.bfloat16: 0.1, torch.float16: 0.02, torch.float32: 1e-4}[dtype], "half an ulp of a logit"
    slopes = [torch.autograd.grad(out, into, up) for out, into, up in ((ours, inputs, upstream), (expected, wide, upstream.double()))]
    for a, b in zip(*slopes, strict=True):
        assert (a.double() - b).norm() < (0.02 if dtype != torch.float32 else 1e-5) * b.norm()
