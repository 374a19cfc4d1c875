"""Packed = each document alone = paged under random schedules, in float64; no mask of T x S; a window one too wide is seen."""

import random

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from garage.kernels.loss import linear_cross_entropy
from garage.models.attend import PagedAttend, PageTable
from garage.models.batch import pack
from garage.models.reference import ReferenceAttend

PAGE = 4


def documents(seed: int) -> list[list[int]]:
    draw = random.Random(seed)
    lengths = [draw.choice([1, 3, 7, 8, 9, 16, 17, 24, 24, 37]) for _ in range(draw.randint(1, 6))]
    return [[draw.randrange(96) for _ in range(length)] for length in lengths]


def alone(model, docs):
    """Each document by itself under the definition."""
    out = []
    for doc in docs:
        tokens, positions = torch.tensor(doc), torch.arange(len(doc))
        out.append(model(tokens, positions, ReferenceAttend(torch.zeros(len(doc), dtype=torch.long), positions)))
    return torch.cat(out)


class Pages:
    """A toy engine: random chunks of random requests, pages handed out in random order, memory full of NaN."""

    def __init__(self, model, docs, seed):
        self.model, self.docs, self.draw = model, docs, random.Random(seed)
        c = model.config
        needed = [(len(doc) + PAGE - 1) // PAGE for doc in docs]
        self.free = list(range(sum(needed) + 3))
        self.draw.shuffle(self.free)
        shape = (len(self.free), PAGE, c.num_key_value_heads, c.head_dim)
        self.keys = [torch.full(shape, torch.nan, dtype=torch.float64) for _ in range(c.num_hidden_layers)]
        self.values = [torch.full(shape, torch.nan, dtype=torch.float64) for _ in range(c.num_hidden_layers)]
        self.tables = [[self.free.pop() for _ in range(count)] for count in needed]
        self.done = [0] * len(docs)

    def chunk(self, i):
        left = len(self.docs[i]) - self.done[i]
        return min(left, self.draw.choice([1, 1, 2, 5, 8, 30]))

    def step(self):
        """One mixed step; returns {request: hidden states of its rows}."""
        waiting = [i for i in range(len(self.docs)) if self.done[i] < len(self.docs[i])]
        chosen = sorted(self.draw.sample(waiting, self.draw.randint(1, len(waiting))))
        rows = [self.chunk(i) for i in chosen]
        spans = [(i, self.done[i], self.done[i] + n) for i, n in zip(chosen, rows, strict=True)]
        slots = [self.tables[i][p // PAGE] * PAGE + p % PAGE for i, a, b in spans for p in range(a, b)]
        wide = max(len(self.tables[i]) for i in chosen)
        tables = torch.tensor([self.tables[i] + [0] * (wide - len(self.tables[i])) for i in chosen])
        pages = [PageTable(torch.tensor(slots), tables)] * len(self.keys)
        attend = PagedAttend(self.keys, self.values, pages, tuple(rows), tuple(b for _, _, b in spans))
        tokens = torch.tensor([t for i, a, b in spans for t in self.docs[i][a:b]])
        positions = torch.tensor([p for _, a, b in spans for p in range(a, b)])
        hidden = self.model(tokens, positions, attend).split(rows)
        for i, _, b in spans:
            self.done[i] = b
        return dict(zip(chosen, hidden, strict=True))

    def run(self):
        parts = [[] for _ in self.docs]
        while any(done < len(doc) for done, doc in zip(self.done, self.docs, strict=True)):
            for i, hidden in self.step().items():
                parts[i].append(hidden)
        return torch.cat([torch.cat(part) for part in parts])


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("family", ["gemma3", "qwen3"])
def test_packed_is_alone_is_paged(fresh, family, seed):
    model, docs = fresh(family, num_hidden_layers=7 if family == "gemma3" else 2), documents(seed)
    batch = pack(docs)
    with torch.no_grad():
        expected = alone(model, docs)
        packed = model(batch.tokens_T, batch.positions_T, batch.attend())
        assert (packed - expected).abs().max() < 1e-12
        assert (Pages(model, docs, seed).run() - expected).abs().max() < 1e-12


def test_window_one_too_wide_is_seen(fresh, twin):
    model, docs = fresh("gemma3"), documents(3)
    wide = twin(model, torch.float64, sliding_window=model.config.sliding_window + 1)
    with torch.no_grad():
        assert (Pages(wide, docs, 0).run() - alone(model, docs)).abs().max() > 1e-4
        batch = pack(docs)
        assert (wide(batch.tokens_T, batch.positions_T, batch.attend()) - alone(model, docs)).abs().max() > 1e-4


def test_packed_gradients_are_the_definitions(fresh):
    model, docs = fresh("gemma3", num_hidden_layers=6), documents(5)
    batch = pack(docs)
    document = torch.repeat_interleave(torch.arange(len(docs)), batch.bounds.diff())
    grads = []
    for attend in (batch.attend(), ReferenceAttend(document, batch.positions_T)):
        model.zero_grad()
        model(batch.tokens_T, batch.positions_T, attend).pow(2).sum().backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    for name, grad in grads[0].items():
        assert (grad - grads[1][name]).abs().max() < 1e-9 * max(1.0, float(grad.abs().max())), name


def test_a_decode_step_is_one_call_whatever_its_size(fresh, monkeypatch):
    """64 requests that feed one token each make as many attention calls as 2: one per layer."""
    from garage.kernels import paged

    calls, real = [], paged.F.scaled_dot_product_attention
    monkeypatch.setattr(paged.F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or real(*a, **k))
    counts = []
    for size in (2, 64):
        pages = Pages(fresh("qwen3", num_hidden_layers=2), [[1, 2]] * size, 0)
        model = pages.model
        calls.clear()
        slots = torch.tensor([table[0] * PAGE for table in pages.tables])
        attend = PagedAttend(pages.keys, pages.values, [PageTable(slots, torch.tensor(pages.tables))] * 2, (1,) * size, (1,) * size)
        with torch.no_grad():
            model(torch.ones(size, dtype=torch.long), torch.zeros(size, dtype=torch.long), attend)
        counts.append(len(calls))
    assert counts == [2, 2]


class Largest(TorchDispatchMode):
    """The size of the largest tensor that any op returns."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


@pytest.mark.parametrize("docs", [[4096], [1024] * 4, [3000, 1000, 96]])
def test_no_dense_mask_and_no_logits(fresh, docs):
    """Training at T = 4096: no tensor reaches T x 512 elements, far from T x S and from T x V."""
    model = fresh("gemma3", torch.float32, num_hidden_layers=6, sliding_window=64, vocab_size=2048)
    batch = pack([[i % 96 for i in range(length)] for length in docs])
    with Largest() as largest:
        hidden = model(batch.tokens_T, batch.positions_T, batch.attend())
        linear_cross_entropy(hidden, model.lm_head.weight, batch.tokens_T, chunk_rows=64).loss.backward()
    assert largest.numel < 4096 * 512
    with Largest() as dense:
        reference = ReferenceAttend(torch.zeros(4096, dtype=torch.long), torch.arange(4096))
        reference(*(torch.zeros(4096, 1, 2) for _ in range(3)), layer=0, scale=1.0, window=None)
    assert dense.numel >= 4096 * 4096


def test_a_nan_of_one_request_stays_with_it(fresh):
    """A request whose pages hold NaN shares a decode step with a longer and a shorter one; both come out as without it."""
    docs = [[5] * 11, [6] * 30, [7] * 4]
    outs = []
    for poisoned in (False, True):
        pages = Pages(fresh("qwen3", num_hidden_layers=2), docs, 1)
        pages.chunk = lambda i, p=pages: len(p.docs[i]) - 1 if p.done[i] == 0 else 1
        with torch.no_grad():
            while min(pages.done) == 0:
                pages.step()
            pages.done = [len(doc) - 1 for doc in docs]
            for pool in (*pages.keys, *pages.values) if poisoned else ():
                pool[pages.tables[1]] = torch.nan
            pages.draw.sample = lambda waiting, count: waiting
            outs.append(pages.step())
    assert outs[1][1].isnan().all() and torch.equal(outs[0][0], outs[1][0]) and torch.equal(outs[0][2], outs[1][2])


def test_nothing_sees_later_tokens_or_other_documents(fresh):
    """Changing a later token, or another document's, changes nothing before it."""
    model = fresh("gemma3")
    docs = [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10], [11, 12, 13]]
    batch, changed = pack(docs), pack([[*docs[0][:-1], 50], [60, 61, 62]])
    with torch.no_grad():
        before = model(batch.tokens_T, batch.positions_T, batch.attend())
        after = model(changed.tokens_T, changed.positions_T, changed.attend())
    assert torch.equal(before[:9], after[:9]) and not torch.equal(before[9:], after[9:])
