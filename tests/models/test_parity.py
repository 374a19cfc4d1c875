"""Every family against transformers: tiny, all weights random, fp32. Logits within 3e-5, gradients within 1e-4; broken twins fail."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from garage.kernels.loss import linear_cross_entropy
from garage.models.batch import pack
from garage.models.config import Rope
from garage.models.layers import RMSNorm, inverse_frequencies, rotary_angles

KINDS = ["gemma3", "gemma3-linear", "gemma3-all-full", "qwen3-tied", "qwen3-untied", "qwen3-linear", "qwen3-yarn"]
TOKENS = torch.randint(0, 96, (2, 44), generator=torch.Generator().manual_seed(5))


def our_logits(model):
    batch = pack(TOKENS.tolist())
    return model.logits(model(batch.tokens_T, batch.positions_T, batch.attend())).view(*TOKENS.shape, -1)


@pytest.mark.parametrize("kind", KINDS)
def test_logits(pair, kind):
    made = pair(kind)
    with torch.no_grad():
        theirs, ours = made.theirs(TOKENS).logits, our_logits(made.ours)
    assert theirs.std() > 0.3
    assert (theirs - ours).abs().max() < 3e-5


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(pair, kind):
    made = pair(kind)
    made.theirs.zero_grad()
    made.ours.zero_grad()
    F.cross_entropy(made.theirs(TOKENS).logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()).backward()
    batch, targets = pack(TOKENS.tolist()), F.pad(TOKENS[:, 1:], (0, 1), value=-100).flatten()
    hidden = made.ours(batch.tokens_T, batch.positions_T, batch.attend())
    head = linear_cross_entropy(hidden, made.ours.lm_head.weight, targets, chunk_rows=13)
    assert head.count == 2 * 43
    (head.loss / head.count).backward()
    theirs = dict(made.theirs.named_parameters())
    for name, parameter in made.ours.named_parameters():
        assert theirs[name].grad.abs().max() > 0, name
        assert (theirs[name].grad - parameter.grad).abs().max() < 1e-4 * max(1.0, float(theirs[name].grad.abs().max())), name


def test_padded_batch_of_two_lengths(pair):
    """A pack of two lengths gives what transformers gives for each alone."""
    made = pair("gemma3-linear")
    documents = [TOKENS[0, :9].tolist(), TOKENS[1].tolist()]
    batch = pack(documents)
    with torch.no_grad():
        ours = made.ours.logits(made.ours(batch.tokens_T, batch.positions_T, batch.attend())).split([9, 44])
        for document, logits in zip(documents, ours, strict=True):
            assert (made.theirs(torch.tensor([document])).logits[0] - logits).abs().max() < 3e-5


CONFIG_TWINS = {
    "window too wide": lambda c: {"sliding_window": c.sliding_window + 1},
    "window too narrow": lambda c: {"sliding_window": c.sliding_window - 1},
    "pattern": lambda c: {"layer_types": tuple("full_attention" if i % 2 else "sliding_attention" for i in range(7))},
    "one theta": lambda c: {"rope_sliding": Rope(theta=c.rope.theta)},
    "scale from head_dim": lambda c: {"query_pre_attn_scalar": c.head_dim},
    "factor left out": lambda c: {"rope": replace(c.rope, kind="default")},
    "factor on sliding layers": lambda c: {"rope_sliding": replace(c.rope_sliding, kind="linear", factor=8.0)},
}


@pytest.mark.parametrize("trap", CONFIG_TWINS)
def test_broken_config_differs(pair, twin, trap):
    made = pair("gemma3-linear")
    broken = twin(made.ours, **CONFIG_TWINS[trap](made.ours.config))
    with torch.no_grad():
        assert (our_logits(made.ours) - our_logits(broken)).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["gemma3", "qwen3-tied"])
def test_other_norm_form_differs(pair, twin, kind):
    broken = twin(pair(kind).ours)
    for module in broken.modules():
        if isinstance(module, RMSNorm):
            module.offset = 1.0 - module.offset
    with torch.no_grad():
        assert (our_logits(pair(kind).ours) - our_logits(broken)).abs().max() > 0.1


def test_yarn_left_out_differs(pair, twin):
    made = pair("qwen3-yarn")
    with torch.no_grad():
        assert (our_logits(made.ours) - our_logits(twin(made.ours, rope=Rope(theta=1e6)))).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["qwen3-tied", "gemma3"])
def test_where_the_norm_rounds(pair, kind):
    """In bf16 each family's norm agrees with transformers bit for bit nearly everywhere; rounding at the other place does not."""
    norm = pair(kind).ours.model.norm
    x, weight = torch.randn(64, 48, generator=torch.Generator().manual_seed(1)).bfloat16(), norm.weight.detach().bfloat16()
    theirs, ours = type(pair(kind).theirs.model.norm)(48, eps=1e-6), RMSNorm(48, 1e-6, offset=norm.offset)
    for module in (theirs, ours):
        module.weight = torch.nn.Parameter(weight)
    normal, gain = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6), weight.float() + norm.offset
    other = (normal * gain).bfloat16() if not norm.offset else normal.bfloat16() * gain.bfloat16()
    assert (ours(x) == theirs(x)).float().mean() > 0.98
    assert (other == theirs(x)).float().mean() < 0.9


def test_embedding_scale_is_rounded_to_bf16(fresh):
    """sqrt(48) is 6.928; in bf16 the multiplier is 6.9375, in fp32 it is not rounded."""
    model = fresh("gemma3", torch.bfloat16, num_hidden_layers=1)
    seen = {}
    model.model.layers[0].register_forward_pre_hook(lambda _, inputs: seen.update(x=inputs[0]))
    batch = pack([[3, 4, 5]])
    with torch.no_grad():
        model(batch.tokens_T, batch.positions_T, batch.attend())
        rows = model.model.embed_tokens.weight[batch.tokens_T]
    assert torch.equal(seen["x"], rows * torch.tensor(6.9375, dtype=torch.bfloat16))


@pytest.mark.parametrize("rope", [Rope(theta=1e6, kind="linear", factor=8.0), Rope(theta=1e6, kind="yarn", factor=4.0, original=32768)])
def test_long_positions(rope):
    """Position 100,000 against float64; without the scaling it is far off."""
    position, width = torch.tensor([100_000]), 128
    pairs = torch.arange(0, width, 2, dtype=torch.float64)
    freq, gain = rope.theta ** (-pairs / width), 1.0
    if rope.kind == "linear":
        freq = freq / 8
    else:
        low, high, gain = 23, 40, 1.1386294361
        ramp = ((pairs / 2 - low) / (high - low)).clamp(0, 1)
        freq = freq * (1 - ramp) + freq / 4 * ramp
    cos, sin = rotary_angles(position, rope, width, torch.float32)
    angle = 100_000 * freq
    assert (cos[0] - angle.cos() * gain).abs().max() < 2e-2 and (sin[0] - angle.sin() * gain).abs().max() < 2e-2
    plain, _ = rotary_angles(position, replace(rope, kind="default"), width, torch.float32)
    assert (plain[0] - angle.cos() * gain).abs().max() > 0.5


def test_yarn_frequencies_as_published():
    """For factor 4, 32768 positions, H 128, theta 1e6: pairs below 23 turn as before, from 40 on four times slower, gain 1.13863."""
    plain, _ = inverse_frequencies(Rope(theta=1e6), 128)
    yarn, gain = inverse_frequencies(Rope(theta=1e6, kind="yarn", factor=4.0, original=32768), 128)
    assert torch.equal(yarn[:24], plain[:24]) and torch.allclose(yarn[40:], plain[40:] / 4, rtol=1e-6)
    assert not torch.allclose(yarn[24:40], plain[24:40], rtol=1e-3) and math.isclose(gain, 1.13863, abs_tol=1e-5)
