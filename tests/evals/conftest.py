"""A generator that answers from a script, and tasks of many small questions."""

from collections.abc import Callable, Sequence

import pytest

from garage.core.types import Completion, Message, Request, Row


class Scripted:
    """Answers each request with `say(question)`; None is a failed request. Remembers what it was asked."""

    def __init__(self, say: Callable[[str], str | None], *, shuffled: bool = False, dies_after: int | None = None) -> None:
        self.say, self.shuffled, self.dies_after = say, shuffled, dies_after
        self.asked: list[Request] = []

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        if self.dies_after is not None and len(self.asked) >= self.dies_after:
            raise KeyboardInterrupt
        self.asked += requests
        out = []
        for request in requests:
            text = self.say(request.prompt[-1].content)
            error = "the server is away" if text is None else ""
            out.append(Completion(request.id, text or "", tuple(range(len(text or ""))), "error" if error else "stop", 9, error=error))
        return out[::-1] if self.shuffled else out


@pytest.fixture
def scripted() -> type[Scripted]:
    return Scripted


@pytest.fixture
def sums() -> list[Row]:
    """150 questions "0 + 7" .. "149 + 7" with answers in the GSM8K form."""
    return [qa(str(k), f"{k} + 7", f"so <<{k}+7={k + 7}>>\n#### {k + 7}") for k in range(150)]


def qa(id: str, question: str, answer: str) -> Row:
    return Row(id, (Message("user", question), Message("assistant", answer)))
