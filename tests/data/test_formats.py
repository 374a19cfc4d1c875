"""Each format to rows and back, without loss; what does not fit is refused with a reason."""

import pytest

from garage.core.errors import UserError
from garage.core.types import Message, ToolCall
from garage.data.formats import FORMATS, RowError, detect, from_rows, mapped, to_rows

TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
FIXTURES = {
    "alpaca": [{"instruction": "Add.", "input": "1 2", "output": "3"}, {"instruction": "Say hi.", "input": "", "output": "hi"}],
    "messages": [
        {"messages": [
            *TURNS,
            {"role": "user", "content": "Bye"},
            {"role": "assistant", "content": "Ciao", "reasoning_content": "They leave."}]},
        {"messages": [
            {"role": "user", "content": "Weather?"},
            {"role": "assistant", "content": "", "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{\"city\": \"Köln\"}"}}]},
            {"role": "tool", "content": "rain", "tool_call_id": "c1", "name": "look"},
            {"role": "assistant", "content": "Rain."}],
         "tools": [{"type": "function", "function": {"name": "look", "parameters": {}}}]},
    ],
    "conversations": [{"conversations": TURNS}],
    "sharegpt": [{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}],
    "question/answer": [
        {"question": "2+2?", "answer": "4", "level": "easy"},
        {"question": "Why?", "system": "Be kind.", "answer": "Because."},
    ],
    "problem/solution": [{"problem": "x = 1?", "solution": "yes"}],
    "prompt/completion": [{"prompt": "Once", "completion": " upon"}],
    "prompt/response": [{"prompt": "Once", "response": "upon"}],
    "prompt/story": [{"prompt": "A fox.", "story": "There was a fox."}],
    "preference": [
        {"prompt": "Hi", "chosen": "Hello", "rejected": "What"},
        {"prompt": [*TURNS, {"role": "user", "content": "?"}], "chosen": "Yes", "rejected": "No"},
    ],
    "qa_pairs": [{"summary": "S", "qa_pairs": [{"question": "a?", "answer": "A"}, {"question": "b?", "answer": "B"}], "file": "x"}],
    "text": [{"text": "A long story.\n\nThe end."}],
}  # fmt: skip


def rows_of(objects):
    fmt = detect(objects, "here")
    return fmt, [row for n, raw in enumerate(objects) for row in to_rows(fmt, raw, id=f"r{n}", source=f"f:{n}")]


@pytest.mark.parametrize("name", FIXTURES)
def test_a_format_is_found_read_and_written_back_without_loss(name):
    fmt, rows = rows_of(FIXTURES[name])
    assert fmt.name == name
    written = list(from_rows(rows, name))
    assert [rows_of([raw])[1] for raw in written] == [rows_of([raw])[1] for raw in FIXTURES[name]]
    system_first = [raw for raw in FIXTURES[name] if isinstance(raw.get("prompt"), list)]
    assert all(raw in written for raw in FIXTURES[name] if raw not in system_first)


def test_a_conversation_survives_every_format_that_can_hold_it():
    _, (row,) = rows_of([{"question": "2+2?", "answer": "4"}])
    for fmt in FORMATS:
        if fmt.name not in ("preference", "text"):
            (again,) = rows_of(list(from_rows([row], fmt.name)))[1]
            assert again.messages == row.messages, fmt.name


def test_gsm8k_rows_are_questions_and_answers():
    fmt, (row,) = rows_of([{"question": "How many?", "answer": "2+2 = <<2+2=4>>4\n#### 4"}])
    assert fmt.name == "question/answer"
    assert row.messages == (Message("user", "How many?"), Message("assistant", "2+2 = <<2+2=4>>4\n#### 4"))


def test_tool_calls_and_roles_arrive_as_they_are():
    _, rows = rows_of(FIXTURES["messages"])
    assert rows[0].messages[-1].reasoning == "They leave."
    assert rows[1].messages[1].tool_calls == (ToolCall("c1", "look", "{\"city\": \"Köln\"}"),)
    assert rows[1].messages[2].tool_call_id == "c1" and rows[1].tools[0]["type"] == "function"


def test_an_own_mapping_of_columns():
    fmt = mapped({"prompt": "Frage", "answer": "Antwort", "system": "Rolle"}, [{"Frage": "a", "Antwort": "b", "Rolle": "c"}], "here")
    (row,) = to_rows(fmt, {"Frage": "a?", "Antwort": 7, "Rolle": "kind"}, id="1", source="")
    assert [(m.role, m.content) for m in row.messages] == [("system", "kind"), ("user", "a?"), ("assistant", "7")]


@pytest.mark.parametrize(
    ("columns", "says"),
    [({"prompt": "a", "answer": "nope"}, "no column 'nope'"), ({"reply": "a"}, "'reply' is no part"), ({"prompt": "a"}, "make no row")],
)
def test_a_wrong_mapping_is_refused(columns, says):
    with pytest.raises(UserError, match=says):
        mapped(columns, [{"a": "x"}], "here")


def test_unknown_columns_are_refused_before_training_with_what_is_there_and_what_is_known():
    with pytest.raises(UserError, match=r"columns colour, size") as caught:
        detect([{"size": 1, "colour": 2}], "here")
    assert "instruction" in caught.value.remedy and "prompt, chosen, rejected" in caught.value.remedy


@pytest.mark.parametrize(
    ("raw", "kind", "says"),
    [
        ({"question": "a"}, "missing", "no answer"),
        ({"question": "a", "answer": "  "}, "empty", "answer is empty"),
        ({"question": "a", "answer": ["x"]}, "missing", "answer is list"),
        ({"messages": []}, "missing", "no list of turns"),
        ({"messages": [{"role": "user", "content": "x"}]}, "missing", "no assistant turn"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "missing", "unknown role 'wizard'"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": ""}]}, "empty", "says nothing"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "missing", "turn 1 is list"),
        ({"qa_pairs": [{"question": "a"}]}, "missing", "pair 1"),
        ({"prompt": "a", "chosen": TURNS, "rejected": "x"}, "missing", "same prompt"),
    ],
)
def test_a_row_that_does_not_fit_says_why(raw, kind, says):
    fmt = next(fmt for fmt in FORMATS if set(fmt.required) & set(raw) and (fmt.fits(raw) or fmt.name == "question/answer"))
    with pytest.raises(RowError, match=says) as caught:
        to_rows(fmt, raw, id="1", source="")
    assert caught.value.args[0] == kind


def test_a_row_is_not_written_in_a_format_that_would_lose_some_of_it():
    _, long = rows_of(FIXTURES["messages"])
    for name in ("question/answer", "text", "preference"):
        with pytest.raises(UserError, match="does not fit"):
            list(from_rows(long, name))
    with pytest.raises(UserError, match="tool calls or reasoning"):
        list(from_rows(long, "sharegpt"))
    with pytest.raises(UserError, match="no format 'xml'"):
        list(from_rows(long, "xml"))
