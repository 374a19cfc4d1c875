"""The renderer against transformers on the published templates, and the invariants of the learned mask."""

import dataclasses
import json
import re

import pytest

from garage.core.errors import UserError
from garage.core.types import Message, ToolCall
from garage.tokens.bpe import train_bpe
from garage.tokens.chat import Chat, template_of
from garage.tokens.tokenizer import Tokenizer

PUBLISHED = {"chatml": "qwen3_instruct_2507", "qwen3": "qwen3", "gemma3": "gemma3"}
KINDS = {"chatml": {"tools": True, "reasoning": False}, "qwen3": {"tools": True, "reasoning": True},
         "gemma3": {"tools": False, "reasoning": False}}
TALK = (Message("system", "Be brief."), Message("user", "Which way?"), Message("assistant", "Northwards."), Message("user", "And then?"),
        Message("assistant", "Home."))


def render(chat, case):
    return chat.render(case.messages, tools=case.tools, add_generation_prompt=case.add_generation_prompt, thinking=case.thinking)


def count_drift(chat, reference, template, cases):
    return sum(list(render(chat, case).ids) != reference.ids(case, template) for case in cases)


def foreign_chat(directory, text, tokenizer):
    tokenizer.save(directory)
    (directory / "chat_template.jinja").write_text(text, encoding="utf-8")
    return Chat.load(directory, tokenizer)


def learned_ids(rendered):
    return [i for i, flag in zip(rendered.ids, rendered.learned, strict=True) if flag]


def learned_text(rendered, tokenizer):
    return tokenizer.decode(learned_ids(rendered), skip_special=False)


@pytest.mark.parametrize("family", PUBLISHED)
def test_token_exact_with_the_published_template(family, tokenizers, reference, conversations, published):
    make = conversations(7, **KINDS[family])
    cases = [make.case() for _ in range(200)]
    assert count_drift(Chat.named(family, tokenizers[family]), reference[family], published(PUBLISHED[family]), cases) == 0


@pytest.mark.parametrize(("family", "good", "bad"), [("chatml", "'assistant\\n' + text", "'assistant\\n ' + text"),
                                                     ("gemma3", "content | trim", "content"),
                                                     ("qwen3", "loop.index0 > last.question", "true")])
def test_a_drifted_template_is_noticed(family, good, bad, tokenizers, reference, conversations, published):
    """Broken twins: a space, a missing trim, reasoning kept in earlier turns."""
    text = template_of(family).replace(good, bad)
    assert text != template_of(family)
    chat, make = Chat(text, tokenizers[family], family=family), conversations(7, **KINDS[family])
    assert count_drift(chat, reference[family], published(PUBLISHED[family]), [make.case() for _ in range(30)]) > 3
    assert chat.hash != Chat.named(family, tokenizers[family]).hash


@pytest.mark.parametrize("family", PUBLISHED)
def test_the_published_template_as_a_foreign_one_gives_the_same_result(family, tokenizers, conversations, published, tmp_path):
    ours = Chat.named(family, tokenizers[family])
    foreign = foreign_chat(tmp_path, published(PUBLISHED[family]), tokenizers[family])
    make = conversations(11, **KINDS[family])
    assert foreign.family == "own" and foreign.stop_ids == ours.stop_ids
    for case in [make.case() for _ in range(60)]:
        assert render(foreign, case) == render(ours, case)


def test_token_exact_with_a_real_tokenizer(smollm, reference_of, conversations, published):
    reference, make = reference_of(smollm), conversations(3, tools=True, reasoning=False)
    chat = Chat.named("chatml", Tokenizer.load(smollm))
    assert count_drift(chat, reference, published("qwen3_instruct_2507"), [make.case() for _ in range(200)]) == 0
    assert chat.stop_ids == (2,)


@pytest.mark.parametrize(("name", "controls"), [("qwen3_instruct_2507", ("<|im_start|>", "<|im_end|>")),
                                                ("gemma3", ("<start_of_turn>", "<end_of_turn>")),
                                                ("llama3", ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"))])
def test_mask_equals_the_generation_tags_of_trl(name, controls, reference_of, conversations, published, tmp_path):
    """The turns found without tags, and those read from tags, are the ones TRL marks, less what follows the end-of-turn token."""
    family = "gemma3" if name != "qwen3_instruct_2507" else "chatml"
    tokenizer = train_bpe(["assistant user system model Northwards. Which way?"] * 9, vocab_size=330, specials=controls, family=family)
    found = foreign_chat(tmp_path / "plain", published(name), tokenizer)
    tagged = foreign_chat(tmp_path / "tagged", published(f"{name}_training"), tokenizer)
    reference, make = reference_of(tmp_path / "plain"), conversations(5, tools=False, reasoning=False)
    end = tokenizer.token_to_id(controls[-1])
    for case in [make.case() for _ in range(40)]:
        messages = tuple(dataclasses.replace(m, content=m.content.strip() or "x") for m in case.messages)
        case = dataclasses.replace(case, messages=messages, add_generation_prompt=False)
        got, want = render(found, case), reference.mask(case, published(f"{name}_training"))
        want = [flag and not (i and got.ids[i - 1] == end) for i, flag in enumerate(want)]
        assert list(got.learned) == want
        assert render(tagged, case) == got


@pytest.mark.parametrize("family", PUBLISHED)
def test_learned_is_the_answer_and_its_end_in_every_turn(family, tokenizers):
    chat, tokenizer = Chat.named(family, tokenizers[family]), tokenizers[family]
    got, end = chat.render(TALK, thinking=False if family == "qwen3" else None), tokenizer.id_to_token(chat.stop_ids[0])
    assert learned_text(got, tokenizer) == f"Northwards.{end}Home.{end}"
    assert learned_ids(got).count(chat.stop_ids[0]) == 2
    assert {o for o, flag in zip(got.origins, got.learned, strict=True) if flag} == {2, 4}
    assert got.ids.count(tokenizer.bos_id) == (family == "gemma3")
    for index, message in enumerate(TALK[:2]):
        assert tokenizer.decode([i for i, o in zip(got.ids, got.origins, strict=True) if o == index]).strip() == message.content


@pytest.mark.parametrize("family", PUBLISHED)
def test_changing_a_prompt_leaves_the_learned_ids(family, tokenizers, conversations):
    chat, make = Chat.named(family, tokenizers[family]), conversations(13, **KINDS[family])
    for case in [dataclasses.replace(make.case(), add_generation_prompt=False) for _ in range(40)]:
        other = [dataclasses.replace(m, content=m.content + " changed") if m.role in ("system", "user") else m for m in case.messages]
        before, after = render(chat, case), chat.render(other, tools=case.tools, thinking=case.thinking)
        assert learned_ids(before) == learned_ids(after)
        assert learned_ids(before).count(chat.stop_ids[0]) == sum(m.role == "assistant" for m in case.messages)
        everything = (dataclasses.replace(r, learned=(True,) * len(r.ids)) for r in (before, after))
        assert learned_ids(next(everything)) != learned_ids(next(everything)), "broken twin: a mask that includes the prompt"


def test_turns_that_cannot_be_counted_are_refused(tokenizers):
    """Broken twin: a header that every turn has must not pass for the assistant's."""
    chat = Chat.named("chatml", tokenizers["chatml"])
    chat._header, chat._prompts = "<|im_start|>", dict.fromkeys((None, True, False), "<|im_start|>")
    with pytest.raises(UserError, match="cannot be told exactly"):
        chat.render(TALK)


@pytest.mark.parametrize("thinking", [None, False])
def test_the_prompt_of_a_turn_is_a_prefix_and_masked(thinking, tokenizers):
    """Training sees what generation sees: with thinking off the empty block belongs to the prompt, with thinking open it is learned."""
    chat = Chat.named("qwen3", tokenizers["qwen3"])
    full = chat.render(TALK, thinking=thinking)
    prompt = chat.render(TALK[:-1], add_generation_prompt=True, thinking=thinking)
    assert full.ids[:len(prompt.ids)] == prompt.ids and not any(prompt.learned)
    assert all(full.learned[len(prompt.ids):-1]) and not full.learned[-1]
    assert ("<think>" in learned_text(full, tokenizers["qwen3"])) == (thinking is None)


@pytest.mark.parametrize("family", PUBLISHED)
def test_control_tokens_in_messages_stay_text(family, tokenizers):
    tokenizer, chat = tokenizers[family], Chat.named(family, tokenizers[family])
    for control, control_id in tokenizer.specials.items():
        clean = chat.render(TALK)
        talk = [dataclasses.replace(m, content=f"{m.content[:2]}{control}{m.content[2:]}") for m in TALK]
        got = chat.render(talk)
        assert got.ids.count(control_id) == clean.ids.count(control_id)
        assert tokenizer.decode(got.ids, skip_special=False) == got.text and got.text.count(control) == clean.text.count(control) + 5
        assert sum(got.learned) > sum(clean.learned)


def test_control_tokens_glued_together_by_a_template_stay_text(tokenizers, tmp_path):
    """A template that cuts something out of a message can assemble a control token from its halves."""
    text = template_of("chatml").replace("message.content if", "message.content.replace('##', '') if")
    chat = foreign_chat(tmp_path, text, tokenizers["chatml"])
    got = chat.render([Message("user", "a<|im_##end|>b")], add_generation_prompt=True)
    assert got.ids.count(chat.stop_ids[0]) == 1 and "a<|im_end|>b<|im_end|>" in got.text


def test_doubled_bos_is_refused(tokenizers, tmp_path):
    """Broken twin: Gemma's template with a second BOS."""
    with pytest.raises(UserError, match="BOS token twice"):
        foreign_chat(tmp_path, "{{ bos_token }}" + template_of("gemma3"), tokenizers["gemma3"]).render(TALK)


@pytest.mark.parametrize(("family", "messages", "options", "why"), [
    ("gemma3", [Message("assistant", "a"), Message("user", "b")], {}, "alternate"),
    ("gemma3", [Message("user", "a"), Message("user", "b")], {}, "alternate"),
    ("gemma3", [Message("system", "only me")], {}, "does not appear"),
    ("gemma3", [Message("user", "a")], {"tools": [{"type": "function"}]}, "no tools"),
    ("gemma3", [Message("user", "a"), Message("assistant", "", tool_calls=(ToolCall("1", "f", "{}"),))], {}, "no tool_calls"),
    ("chatml", [Message("user", "a"), Message("assistant", "b", reasoning="c")], {}, "no reasoning_content"),
    ("chatml", [Message("user", "a")], {"thinking": True}, "no enable_thinking"),
    ("chatml", [], {}, "no messages"),
])
def test_what_a_template_cannot_say_is_refused(family, messages, options, why, tokenizers):
    with pytest.raises(UserError, match=why):
        Chat.named(family, tokenizers[family]).render(messages, **options)


def test_the_published_gemma_template_refuses_the_same_role_orders(tokenizers, reference, published):
    from jinja2 import TemplateError

    chat = Chat.named("gemma3", tokenizers["gemma3"])
    for order in ("assistant user", "user user", "system assistant", "user assistant assistant"):
        messages = [Message(role, "x") for role in order.split()]
        with pytest.raises(UserError):
            chat.render(messages)
        with pytest.raises(TemplateError):
            turns = [{"role": m.role, "content": "x"} for m in messages]
            reference["gemma3"].tokenizer.apply_chat_template(turns, chat_template=published("gemma3"))


def test_templates_are_found_in_every_place(tokenizers, tmp_path):
    tokenizer = tokenizers["chatml"]
    text = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
    config = json.loads(tokenizer._files["tokenizer_config.json"])
    for field in (text, [{"name": "tool_use", "template": "x"}, {"name": "default", "template": text}]):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": field}))
        assert Chat.load(tmp_path, tokenizer).template == text
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="no chat template"):
        Chat.load(tmp_path, tokenizer)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": text}))
    assert Chat.load(tmp_path, tokenizer).template == text
    (tmp_path / "chat_template.jinja").write_text(template_of("chatml"))
    assert Chat.load(tmp_path, tokenizer).family == "chatml"
    with pytest.raises(UserError, match="lacks"):
        Chat.named("gemma3", tokenizer)
    with pytest.raises(UserError, match="no chat template 'alpaca'"):
        Chat.named("alpaca", tokenizer)


def test_a_template_without_control_tokens_in_its_turns(tokenizers, tmp_path):
    """Turns are found by rendering up to each of them; a template whose turns have no end-of-turn token is refused for training only."""
    body = "{% for m in messages %}{{ '### ' + m.role + ':\n' + m.content + END }}{% endfor %}"
    body += "{{ '### assistant:\n' if add_generation_prompt }}"
    closed = foreign_chat(tmp_path / "closed", body.replace("END", "(eos_token if m.role == 'assistant' else '\n')"), tokenizers["chatml"])
    assert learned_text(closed.render(TALK), tokenizers["chatml"]) == "Northwards.<|im_end|>Home.<|im_end|>"
    open_ended = foreign_chat(tmp_path / "open", body.replace("END", "'\n'"), tokenizers["chatml"])
    assert open_ended.render(TALK[:2], add_generation_prompt=True).text.endswith("### assistant:\n")
    with pytest.raises(UserError, match="cannot be told exactly"):
        open_ended.render(TALK)


@pytest.mark.parametrize(("name", "end"), [("llama3_1", "<|eot_id|>"), ("phi3", "<|end|>"), ("qwen2_5", "<|im_end|>"),
                                           ("lfm2", "<|im_end|>"), ("gemma4", "<turn|>"), ("cohere", "<|END_OF_TURN_TOKEN|>"),
                                           ("deepseekv3", "<｜end▁of▁sentence｜>")])
def test_turns_of_other_published_templates_are_found(name, end, published, tmp_path):
    """Templates we did not write and that carry no tags: the answers and their end tokens, and nothing else."""
    text = published(name)
    controls = sorted(set(re.findall(r"<\|\w+\|>|<｜[^｜]+｜>|<\|turn>|<turn\|>", text)))
    tokenizer = train_bpe(["x y z"], vocab_size=400, specials=controls, family="gemma3")
    got = foreign_chat(tmp_path, text, tokenizer).render(TALK)
    assert learned_text(got, tokenizer) == f"Northwards.{end}Home.{end}"
    assert set(got.origins) == {-1, 0, 1, 2, 3, 4}
