"""Proof that what was written is what was trained: read it back from disk, replay prompts, measure the difference.

The source writes a greedy continuation of every prompt; both models then see the same token ids and are compared at every place of the
continuations, in fp32 arithmetic, so that what is measured is the rounding of the stored weights and nothing else. Since the ids are the
source's own choices, an export that agrees on every one of them writes the same text.

`effect` is the distance between the tuned model and its base. An export whose error is more than half of it has lost the tuning, however
small its error looks: dropping an adapter, or rounding a small update away, is caught by this and by nothing absolute.

Limits: a certificate speaks of the prompts that were replayed; two fp32 models are in memory at a time, on the CPU.
Shape suffixes: T places compared, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from garage.core.types import Message
from garage.models.batch import pack
from garage.models.layers import Model
from garage.tokens.voice import Voice

NEW_TOKENS = 16
GROUP = 8
NEGLIGIBLE = 1e-9  # nats of mean KL below which two models count as one
# By the precision of the stored weights (relative steps 6e-8, 5e-4, 4e-3): largest mean KL in nats, smallest top-1 agreement.
LIMITS = {"float32": (1e-6, 0.99), "float16": (1e-3, 0.97), "bfloat16": (2e-2, 0.90)}
QUESTIONS = (
    "What is {a} plus {b}?",
    "Translate into French: the train leaves at {b}.",
    "Summarise: the meeting was moved from room {a} to room {b}.",
)


@dataclass(frozen=True)
class Certificate:
    """What the replay measured; `effect` is None where there is no adapter, `faults` says in words why `ok` is false.

    `max_diff` and `mean_diff` are differences of logits; older certificates lack the second.
    """

    ok: bool
    dtype: str
    prompts: int
    positions: int
    kl: float
    max_diff: float
    top1: float
    greedy: float
    effect: float | None
    faults: tuple[str, ...]
    mean_diff: float | None = None


@dataclass(frozen=True)
class Replay:
    """Token ids of prompts with the source's continuations; `starts` are the prompts' lengths."""

    ids: tuple[tuple[int, ...], ...]
    starts: tuple[int, ...]


@dataclass(frozen=True)
class Distance:
    """Mean KL(a || b) in nats, largest and mean difference of logits, agreement by place and by whole continuation."""

    kl: float
    max_diff: float
    mean_diff: float
    top1: float
    greedy: float


def default_prompts(count: int) -> list[tuple[Message, ...]]:
    """`count` different questions, the same every time."""
    return [(Message("user", QUESTIONS[k % len(QUESTIONS)].format(a=3 + k, b=11 + 7 * k % 89)),) for k in range(count)]


@torch.no_grad()
def replay(source: Model, voice: Voice, prompts: Sequence[tuple[Message, ...]]) -> Replay:
    """Render the prompts and let the source continue each greedily."""
    rendered = [voice.chat.render(prompt, add_generation_prompt=True).ids for prompt in prompts]
    ids = [list(prompt) for prompt in rendered]
    for first in range(0, len(ids), GROUP):
        group = ids[first : first + GROUP]
        for _ in range(NEW_TOKENS):
            batch = pack(group)
            hidden = source(batch.tokens_T, batch.positions_T, batch.attend())
            chosen = source.logits(hidden[batch.bounds[1:].long() - 1]).argmax(-1).tolist()
            for document, token in zip(group, chosen, strict=True):
                document.append(token)
    return Replay(tuple(map(tuple, ids)), tuple(map(len, rendered)))


@torch.no_grad()
def distance(a: Model, b: Model, replayed: Replay) -> Distance:
    """Compare two models at every place of the continuations."""
    kls, means, widest, agree, alike = [], [], 0.0, 0, 0
    for first in range(0, len(replayed.ids), GROUP):
        part = Replay(replayed.ids[first : first + GROUP], replayed.starts[first : first + GROUP])
        for a_TV, b_TV in zip(_logits(a, part), _logits(b, part), strict=True):
            p_TV, q_TV = a_TV.double().log_softmax(-1), b_TV.double().log_softmax(-1)
            kls.append((p_TV.exp() * (p_TV - q_TV)).sum(-1))
            widest = max(widest, float((a_TV - b_TV).abs().max()))
            means.append((a_TV - b_TV).abs().mean(-1))
            same_T = a_TV.argmax(-1) == b_TV.argmax(-1)
            agree += int(same_T.sum())
            alike += int(same_T.all())
    kl_T = torch.cat(kls)
    return Distance(float(kl_T.mean()), widest, float(torch.cat(means).mean()), agree / len(kl_T), alike / len(replayed.ids))


def certify(found: Distance, *, dtype: str, effect: float | None, replayed: Replay, voice_faults: Sequence[str]) -> Certificate:
    """Judge what was measured against the limits of the stored precision."""
    (most_kl, least_top1), faults = LIMITS[dtype], list(voice_faults)
    if not found.kl <= most_kl:
        faults.append(f"mean KL {found.kl:.2e} nats is above {most_kl:g}")
    if found.top1 < least_top1:
        faults.append(f"the most likely token agrees at {found.top1:.1%} of places, below {least_top1:.0%}")
    if effect is not None and effect > NEGLIGIBLE and not found.kl <= effect / 2:
        faults.append(f"the error, {found.kl:.2e} nats, is not small beside what the adapter does, {effect:.2e}: the tuning is lost")
    measured = (found.kl, found.max_diff, found.top1, found.greedy, effect)
    return Certificate(not faults, dtype, len(replayed.ids), NEW_TOKENS * len(replayed.ids), *measured, tuple(faults), found.mean_diff)


def voice_faults(source: Voice, export: Voice, prompts: Sequence[tuple[Message, ...]], replayed: Replay) -> list[str]:
    """Where the export would read or render a prompt otherwise than the source."""
    rendered = [export.chat.render(prompt, add_generation_prompt=True).ids for prompt in prompts]
    faults = {
        "the tokenizer is another one": source.tokenizer.hash != export.tokenizer.hash,
        "the chat template is another one": source.chat.hash != export.chat.hash,
        "prompts become other token ids": any(a != b[:n] for a, b, n in zip(rendered, replayed.ids, replayed.starts, strict=True)),
        "a token no longer ends an answer": not set(source.chat.stop_ids) <= set(export.chat.stop_ids),
    }
    return [fault for fault, is_so in faults.items() if is_so]


def _logits(model: Model, part: Replay) -> list[Tensor]:
    """Per prompt, the fp32 scores [T, V] of the tokens that follow it."""
    batch = pack(part.ids)
    hidden = model(batch.tokens_T, batch.positions_T, batch.attend())
    begins = batch.bounds.tolist()
    spans = zip(begins, begins[1:], part.starts, strict=False)
    return [model.logits(hidden[begin + start - 1 : end - 1]).float() for begin, end, start in spans]
