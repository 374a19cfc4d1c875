"""Serving on the kernels, through the one place that chooses them, beside the plain path: prompts, then a step that mixes."""

import pytest
import torch
from cases import DEVICE, draw
from test_training import RAW, build

from garage.kernels import dispatch, paths
from garage.models.attend import PagedAttend, PageTable
from garage.models.quantize import quantised

PAGE = 4


def hidden(model, pool):
    """What the model says of two prompts read in pieces, then of one piece and one token."""
    c, tables = model.config, torch.tensor([[3, 1, 6, 0], [5, 2, 4, 0]], device=DEVICE)
    shape = (8, PAGE, c.num_key_value_heads, c.head_dim)
    keys, values = ([torch.full(shape, torch.nan, device=DEVICE).to(pool) for _ in range(c.num_hidden_layers)] for _ in range(2))
    out, done = [], [0, 0]
    for rows in ((5, 7), (3, 1), (1, 1), (1, 3)):
        spans = [range(start, start + count) for start, count in zip(done, rows, strict=True)]
        positions = torch.tensor([p for span in spans for p in span], device=DEVICE)
        owners = torch.tensor([i for i, span in enumerate(spans) for _ in span], device=DEVICE)
        done = [span.stop for span in spans]
        slots = tables[owners, positions // PAGE] * PAGE + positions % PAGE
        attend = PagedAttend(keys, values, [PageTable(slots, tables)] * len(keys), rows, tuple(done))
        out.append(model((positions * 7 + owners) % 96, positions, attend))
    return torch.cat(out)


@pytest.mark.parametrize("bits", ["int8", "nf4"])
@torch.no_grad()
def test_few_rows_take_the_bits(bits, monkeypatch):
    """A linear in few bits multiplies 16 rows without being widened, and 17 with."""
    linear, x, widened = quantised(draw(40, 128, scale=0.1), bits), draw(17, 128, seed=1), []
    exact, real = x @ linear.weight.dense(torch.float32).T, type(linear.weight).dense
    monkeypatch.setattr(type(linear.weight), "dense", lambda self, *a: widened.append(1) or real(self, *a))
    monkeypatch.setattr(dispatch, "has_dots", lambda x: True)
    assert (linear(x[:16]) - exact[:16]).abs().max() < 1e-5 and not widened
    assert (linear(x) - exact).abs().max() < 1e-5 and widened


@pytest.mark.parametrize("pool", [torch.float32, torch.float8_e4m3fn])
@pytest.mark.parametrize("family", RAW)
@torch.no_grad()  # in inference mode a CPU has compiled ops of its own
def test_a_model_is_served_the_same_on_both_paths(family, pool, monkeypatch):
    model, found, asked, real = build(family, ""), [], [], paths._twin
    monkeypatch.setattr(paths, "_twin", lambda name: asked.append(name.rpartition(".")[2]) or real(name))
    for fused in (False, True):
        for module in (paths, dispatch):
            monkeypatch.setattr(module, "is_fused", lambda x, fused=fused: fused)
        monkeypatch.setattr(dispatch, "has_dots", lambda x, fused=fused: fused)
        found.append(hidden(model, pool))
    assert set(asked) == {"norm", "rope", "mlp", "paged"}
    limit = 1e-5 if pool == torch.float32 else 0.02  # a last bit may take a number over the middle of two codes
    assert (found[0] - found[1]).abs().max() < limit * found[0].abs().max()
