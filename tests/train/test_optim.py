"""AdamW against a plain loop, Muon against torch's and against what it promises about singular values."""

import copy

import pytest
import torch

from garage.core.errors import UserError
from garage.specs.train import AdamW8Spec, AdamWSpec, MuonSpec
from garage.train.optim import AdamW, AdamW8, Muon, make_optimizer, orthogonalise, shares, split_hidden

torch.set_num_threads(1)


def leaves(*shapes, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return {f"t{i}": torch.randn(shape, generator=draw) for i, shape in enumerate(shapes)}


def train(optimizer, tensors, steps, *, factor=1.0, start=0):
    for step in range(start, start + steps):
        draw = torch.Generator().manual_seed(100 + step)
        for tensor in tensors.values():
            tensor.grad = torch.randn(tensor.shape, generator=draw)
        optimizer.step(factor)


def test_adamw_is_the_formula_of_the_paper():
    spec, ours = AdamWSpec(lr=0.01, beta1=0.8, beta2=0.95, eps=1e-6, weight_decay=0.1), leaves((7, 5), (9,))
    theirs = {name: tensor.double() for name, tensor in ours.items()}
    moments = {name: (torch.zeros_like(t), torch.zeros_like(t)) for name, t in theirs.items()}
    optimizer = AdamW(ours, spec)
    for step in range(1, 30):
        train(optimizer, ours, 1, factor=0.5, start=step)
        for name, w in theirs.items():
            g, (m, v) = ours[name].grad.double(), moments[name]
            m.mul_(0.8).add_(g, alpha=0.2)
            v.mul_(0.95).add_(g * g, alpha=0.05)
            w.mul_(1 - 0.005 * (0.1 if w.ndim > 1 else 0.0))
            w.sub_(0.005 * (m / (1 - 0.8**step)) / ((v / (1 - 0.95**step)).sqrt() + 1e-6))
    for name in ours:
        torch.testing.assert_close(ours[name].double(), theirs[name], rtol=1e-5, atol=1e-6)


def test_adamw_equals_torchs_plain_implementation():
    ours, theirs = leaves((20, 30), (30, 8)), leaves((20, 30), (30, 8))
    plain = torch.optim.AdamW(theirs.values(), lr=3e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.05, foreach=False)
    train(AdamW(ours, AdamWSpec(lr=3e-3, weight_decay=0.05)), ours, 20)
    for step in range(20):
        draw = torch.Generator().manual_seed(100 + step)
        for tensor in theirs.values():
            tensor.grad = torch.randn(tensor.shape, generator=draw)
        plain.step()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(64, 192), (192, 64), (128, 512), (64, 64)])
def test_muons_update_has_singular_values_near_one(shape):
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(orthogonalise(x))
    assert values.max() < 1.3 and 0.6 < values.median() < 1.2
    assert torch.linalg.svdvals(x).max() > 15
    torch.testing.assert_close(orthogonalise(x)[1], orthogonalise(x[1]), rtol=1e-4, atol=1e-5)


def test_the_singular_value_check_sees_missing_iterations():
    x = torch.randn(64, 192, generator=torch.Generator().manual_seed(1))
    assert torch.linalg.svdvals(orthogonalise(x, 1)).median() < 0.6


def test_muon_equals_torchs_up_to_its_bfloat16():
    names = ("a", "b", "c")
    shapes = ((48, 16), (16, 48), (16, 48))
    ours = dict(zip(names, leaves(*shapes).values(), strict=True))
    theirs = copy.deepcopy(ours)
    oracle = torch.optim.Muon(theirs.values(), lr=0.02, weight_decay=0.1, momentum=0.95, nesterov=True)
    train(Muon(ours, {}, MuonSpec(lr=0.02, momentum=0.95, weight_decay=0.1)), ours, 6)
    train(Step(oracle), theirs, 6)
    moved = sum((ours[n] - t).norm() for n, t in zip(names, leaves(*shapes).values(), strict=True))
    apart = sum((ours[n] - theirs[n]).norm() for n in names)
    assert apart < 0.02 * moved


class Step:
    def __init__(self, optimizer):
        self.step = lambda factor: optimizer.step()


def test_muon_takes_hidden_matrices_only(world):
    named = dict(world.model().named_parameters())
    hidden, rest = split_hidden(named)
    assert len(hidden) == 2 * 7 and all(t.ndim == 2 and n.endswith("_proj.weight") for n, t in hidden.items())
    assert "model.embed_tokens.weight" in rest and all(t.ndim == 1 or "embed" in n for n, t in rest.items())


def test_the_share_of_muon_in_the_reference_model_is_said():
    named = {f"model.layers.{i}.mlp.up_proj.weight": torch.empty(245_760, 1, device="meta") for i in range(3)}
    named["model.embed_tokens.weight"] = torch.empty(6_291_456 + 1_088, device="meta")
    assert shares(named, MuonSpec()) == "7,029,824 trained weights, 737,280 (10.5%) by Muon, the rest by AdamW"


def test_muon_without_hidden_matrices_is_refused():
    with pytest.raises(UserError, match="hidden matrices"):
        make_optimizer({"model.layers.0.self_attn.q_proj.lora_A": torch.zeros(4, 8)}, MuonSpec())


@pytest.mark.parametrize("spec", [AdamWSpec(lr=0.01), AdamW8Spec(lr=0.01), MuonSpec(lr=0.01)])
def test_state_saved_and_loaded_continues_bit_for_bit(spec):
    names = ("model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight", "model.norm.weight")
    one = dict(zip(names, leaves((96, 48), (8, 4), (1000, 5), (4,)).values(), strict=True))
    first = make_optimizer(one, spec)
    train(first, one, 5)
    two, state = copy.deepcopy(one), copy.deepcopy(first.state())
    second = make_optimizer(two, spec)
    second.load(state)
    train(first, one, 5, start=5)
    train(second, two, 5, start=5)
    assert all(torch.equal(one[name], two[name]) for name in names)
    third = make_optimizer(three := copy.deepcopy(two), spec)  # without its state the next steps differ
    train(second, two, 2, start=10)
    train(third, three, 2, start=10)
    assert not torch.equal(two[names[0]], three[names[0]])


def quadratic(make, steps=150, size=(64, 256)):
    """How far from its minimum a sum of squares is left whose rows have very different scales."""
    draw = torch.Generator().manual_seed(3)
    weight, scale = torch.randn(size, generator=draw), torch.logspace(-2, 1, size[0])[:, None]
    optimizer = make({"w": weight})
    for step in range(steps):
        weight.grad = weight * scale + 0.01 * torch.randn(size, generator=draw)
        optimizer.step(1 - step / steps)
    return float((weight.square() * scale).mean())


def test_eight_bit_adamw_gets_as_far_as_thirty_two():
    ours = quadratic(lambda tensors: AdamW8(tensors, AdamW8Spec(lr=0.05)))
    assert ours == pytest.approx(quadratic(lambda tensors: AdamW(tensors, AdamWSpec(lr=0.05))), rel=0.3), "of 1.4 at the start"


def test_a_weight_whose_gradient_is_tiny_beside_its_neighbours_does_not_fly_away():
    """Its squared mean is below the smallest code; rounded to 0 it would be divided by eps alone."""
    weight = torch.zeros(16, 256)
    optimizer = AdamW8({"w": weight}, AdamW8Spec(lr=0.01))
    for _ in range(20):
        weight.grad = torch.full((16, 256), 1e-4)
        weight.grad[:, 0] = 1.0
        optimizer.step(1.0)
    assert weight.abs().max() < 0.5


def test_eight_bit_adamw_is_bitsandbytes():
    theirs = pytest.importorskip("bitsandbytes.optim", reason="bitsandbytes is not installed")
    ours, other = leaves((64, 128)), torch.nn.Parameter(leaves((64, 128))["t0"])
    mine = AdamW8(ours, AdamW8Spec(lr=3e-3, weight_decay=0.05))
    bnb = theirs.AdamW8bit([other], lr=3e-3, betas=(0.9, 0.99), weight_decay=0.05)
    exact = leaves((64, 128))
    full = AdamW(exact, AdamWSpec(lr=3e-3, weight_decay=0.05))
    for step in range(30):
        grad = torch.randn(64, 128, generator=torch.Generator().manual_seed(step))
        for tensor in (ours["t0"], exact["t0"], other):
            tensor.grad = grad.clone()
        mine.step(1.0)
        full.step(1.0)
        bnb.step()
    off, theirs_off = (tensor.sub(exact["t0"]).abs().mean().item() for tensor in (ours["t0"], other.detach()))
    assert off < 1.2 * theirs_off + 1e-6, "no further from the 32-bit update than the published implementation"


def test_eight_bit_state_is_a_quarter():
    tensors = leaves((256, 256), (100,))
    bits8, bits32 = AdamW8(tensors, AdamW8Spec()), AdamW(leaves((256, 256)), AdamWSpec())
    train(bits8, tensors, 1)
    train(bits32, bits32._tensors, 1)
    size = lambda state: sum(t.nbytes for n, t in state.items() if ".t0" in n)  # noqa: E731
    assert size(bits8.state()) < 0.26 * size(bits32.state())
    assert bits8.state()["adamw.exp_avg.t1"].dtype == torch.float32, "small tensors keep 32 bits"


@pytest.mark.parametrize("spec", [AdamWSpec(lr=0.01, lora_plus=16), AdamW8Spec(lr=0.01, lora_plus=16)])
def test_lora_plus_moves_b_sixteen_times_as_far(spec):
    tensors = {"layer.lora_A.weight": torch.zeros(16, 256), "layer.lora_B.weight": torch.zeros(256, 16)}
    optimizer = make_optimizer(tensors, spec)
    for tensor in tensors.values():
        tensor.grad = torch.ones_like(tensor)
    optimizer.step(0.5)
    a, b = (tensor.mean().item() for tensor in tensors.values())
    assert a == pytest.approx(-0.005, rel=1e-3) and b == pytest.approx(16 * a, rel=1e-3)
