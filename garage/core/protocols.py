"""How a stage is handed a model or a judge without importing the engine.

`engine.Engine` and `serve.client.Remote` are both a `Generator`; a test hands over a scripted one.
"""

from collections.abc import Sequence
from typing import Protocol

from garage.core.types import Completion, Request, Score


class Generator(Protocol):
    """Turns requests into completions, in the order of the requests.

    One request's failure is that request's completion (finish_reason "error"); an exception means that the generator as a whole
    cannot go on.
    """

    def generate(self, requests: Sequence[Request]) -> list[Completion]: ...


class Scorer(Protocol):
    """Judges one completion of one prompt. A bad completion is a low score, never an exception."""

    def score(self, prompt: str, completion: str) -> Score: ...
