"""The renderer against transformers on the published templates, and the invariants of the learned mask."""

import dataclasses

import pytest

from garage.core.errors import UserError
from garage.core.types import Message, ToolCall
from garage.tokens.chat import Chat, template_of
from garage.tokens.jail import Trusted
from garage.tokens.tokenizer import Tokenizer

PUBLISHED = {"chatml": "qwen3_instruct_2507", "qwen3": "qwen3", "gemma3": "gemma3"}
KINDS = {"chatml": {"tools": True, "reasoning": False}, "qwen3": {"tools": True, "reasoning": True}, "gemma3": {"tools": False, "reasoning": False}}


def render(chat, case):
    return chat.render(case.messages, tools=case.tools, add_generation_prompt=case.add_generation_prompt, thinking=case.thinking)


def count_drift(chat, reference, template, cases):
    return sum(list(render(chat, case).ids) != reference.ids(case, template) for case in cases)


@pytest.mark.parametrize("family", PUBLISHED)
def test_token_exact_with_the_published_template(family, tokenizers, reference, conversations, published):
    chat, make = Chat.named(family, tokenizers[family]), conversations(7, **KINDS[family])
    cases = [make.case() for _ in range(200)]
    assert count_drift(chat, reference[family], published(PUBLISHED[family]), cases) == 0


@pytest.mark.parametrize("family", PUBLISHED)
def test_a_drifted_template_is_noticed(family, tokenizers, reference, conversations, published):
    """Broken twin: one character more in the template must show in most conversations."""
    text = template_of(family).replace("\\n' + ", "\\n ' + ") if family != "gemma3" else template_of(family).replace("| trim }}", "}}")
    assert text != template_of(family)
    chat, make = Chat(text, tokenizers[family], renderer=Trusted(text), family=family), conversations(7, **KINDS[family])
    assert count_drift(chat, reference[family], published(PUBLISHED[family]), [make.case() for _ in range(20)]) > 5
    assert chat.hash != Chat.named(family, tokenizers[family]).hash


@pytest.mark.parametrize("family", PUBLISHED)
def test_foreign_template_gives_the_same_mask_as_ours(family, tokenizers, reference, conversations, published, tmp_path):
    tokenizers[family].save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(published(PUBLISHED[family]), encoding="utf-8")
    foreign, ours = Chat.load(tmp_path, tokenizers[family]), Chat.named(family, tokenizers[family])
    make = conversations(11, **KINDS[family])
    assert foreign.family == "own" and foreign.stop_ids == ours.stop_ids
    for case in [make.case() for _ in range(60)]:
        assert render(foreign, case) == render(ours, case)


def test_token_exact_with_a_real_tokenizer(smollm, conversations, published):
    from transformers import AutoTokenizer

    hf, tokenizer = AutoTokenizer.from_pretrained(smollm), Tokenizer.load(smollm)
    make = conversations(3, tools=True, reasoning=False)
    reference = type("R", (), {})()
    from_conftest = [make.case() for _ in range(200)]
    chat = Chat.named("chatml", tokenizer)
    del reference
    for case in from_conftest:
        got = render(chat, case)
        assert list(got.ids) == hf.encode(got.text, add_special_tokens=False)
    assert chat.stop_ids == (tokenizer.token_to_id("<|im_end|>"),)


@pytest.mark.parametrize("name", ["qwen3", "qwen2_5", "qwen3_instruct_2507", "gemma3", "llama3", "phi3", "gemma"])
def test_mask_equals_generation_tags_of_trl(name, directories, conversations, published, tmp_path):
    """The turns we find without tags are those TRL marks with tags, less the line break after the end-of-turn token."""
    from tests_reference import Reference  # noqa: F401
