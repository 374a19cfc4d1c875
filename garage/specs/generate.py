"""Settings of `generate` and `chat`: whom to ask, and how. Fields of a request carry their name in the API; none = not sent."""

from pathlib import Path
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from garage.specs.base import Spec
from garage.specs.serve import EngineSpec


class AskSpec(Spec):
    """What `generate` and `chat` have in common."""

    positional: ClassVar[tuple[str, ...]] = ("model",)
    model: str = Field(description="who answers: a directory, Hub id, run, nano, or http://host:port/v1#model (key from OPENAI_API_KEY)")
    system: str = Field("", description="system prompt of conversations that have none")
    adapter: str = Field("", description="adapter that answers, one of lora_modules or of those the endpoint has; empty = the model itself")
    lora_modules: tuple[str, ...] = Field((), description="adapters to load over a local model, each name=DIRECTORY, run or Hub id")
    thinking: bool | None = Field(None, description="whether a model that can reason does; none = as its template says")
    temperature: float | None = Field(None, ge=0, le=10, description="0 is greedy; none, here and below = what the model's authors say")
    max_tokens: int | None = Field(None, ge=1, description="longest answer, in tokens; none = what the context leaves")
    top_p: float | None = Field(None, gt=0, le=1, description="share of likely tokens to choose from")
    top_k: int | None = Field(None, ge=0, description="how many of the likeliest tokens to choose from; 0 = all")
    min_p: float | None = Field(None, ge=0, le=1, description="least probability of a token, as a share of the likeliest one's")
    typical_p: float | None = Field(None, gt=0, le=1, description="share of tokens of typical surprise to choose from")
    presence_penalty: float | None = Field(None, ge=-2, le=2, description="taken from the logit of a token that was written before")
    frequency_penalty: float | None = Field(None, ge=-2, le=2, description="taken from it for each time it was written")
    repetition_penalty: float | None = Field(None, gt=0, le=10, description="divides the logit of tokens read or written before")
    stop: tuple[str, ...] = Field((), max_length=8, description="texts that end an answer")
    engine: EngineSpec = Field(EngineSpec(), description="the engine of a local model")

    def asked(self) -> dict[str, object]:
        """The fields of a request that were given."""
        given = {name: getattr(self, name) for name in SAMPLING if getattr(self, name) is not None}
        thinking = {} if self.thinking is None else {"chat_template_kwargs": {"enable_thinking": self.thinking}}
        return given | thinking | ({"stop": list(self.stop)} if self.stop else {})


SAMPLING = (
    "temperature", "max_tokens", "top_p", "top_k", "min_p", "typical_p", "presence_penalty", "frequency_penalty", "repetition_penalty",
)  # fmt: skip


class GenerateSpec(AskSpec):
    """Answer every row of a file, and go on where an interrupted run stopped; the same command again asks only what has no answer."""

    input: Path = Field(description="rows with prompt, messages or text, any dataset, or lines of OpenAI's batch format")
    out: Path = Field(description="file of the answers, JSON Lines in the order of the rows")
    split: str = Field("train", description="split to answer, where the input is a dataset artifact")
    prompts: Literal["chat", "text"] = Field("chat", description="a bare prompt is a user's turn (chat), or a text to be continued (text)")
    n: int = Field(1, ge=1, le=64, description="answers to each row")
    seed: int = Field(0, ge=0, lt=2**63, description="seed of all answers; each row has its own, made of this and its line or custom_id")
    min_tokens: int | None = Field(None, ge=0, description="shortest answer, in tokens")
    ignore_eos: bool = Field(False, description="write up to max_tokens, whatever the model says")
    json_schema: Path | None = Field(None, description="file of the JSON schema that answers must fit")
    regex: str | None = Field(None, min_length=1, description="regular expression that answers must match")
    choice: tuple[str, ...] = Field((), description="texts of which an answer must be one")
    grammar: Path | None = Field(None, description="file of the Lark grammar that answers must fit")
    concurrency: int | None = Field(None, ge=1, le=4096, description="requests at once; none = what the engine runs, or 8 for an address")

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if sum(map(bool, (self.json_schema, self.regex, self.choice, self.grammar))) > 1:
            raise ValueError("json_schema, regex, choice and grammar exclude each other")
        return self


class ChatSpec(AskSpec):
    """Talk to a model in the terminal."""

    temperature: float | None = Field(0.7, ge=0, le=10, description="0 is greedy")
    max_tokens: int | None = Field(512, ge=1, description="longest answer, in tokens")
    load: Path | None = Field(None, description="conversation to go on with: the last row of a dataset, as /save writes it")
    engine: EngineSpec = Field(EngineSpec(max_num_seqs=1), description="the engine of a local model")
