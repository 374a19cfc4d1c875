"""Settings of `ingest` and `synthesize`."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from garage.specs.base import Spec


class IngestSpec(Spec):
    """Read documents into a corpus of chunks that know where they came from."""

    positional: ClassVar[tuple[str, ...]] = ("paths",)
    paths: tuple[Path | str, ...] = Field(
        min_length=1, description="files, folders and zip archives to read; https://... for a web page, git+https://... for a repository"
    )
    out: Path = Field(description="directory of the corpus to write")
    chunk_tokens: int = Field(256, ge=16, le=8192, description="largest chunk, in tokens of the tokenizer")
    overlap_tokens: int = Field(0, ge=0, description="tokens repeated from the end of the chunk before; less than chunk_tokens")
    tokenizer: str = Field("nano", description="model whose tokenizer counts the tokens")
    seconds_per_file: float = Field(60.0, gt=0, description="a file that takes longer is given up and reported")
    memory_per_file: int = Field(1 << 30, ge=1 << 26, description="bytes of memory one file may use before it is given up and reported")


class SynthesizeSpec(Spec):
    """Write a dataset: facts of a corpus asked in several ways, arithmetic worksheets, or rows that a teacher model writes."""

    positional: ClassVar[tuple[str, ...]] = ("corpus",)
    corpus: Path | None = Field(None, description="directory of the corpus to read (extractive, and most kinds of a model)")
    data: Path | None = Field(None, description="dataset to read: the seeds of rewrite, the rows of reasoning, the questions of preference")
    out: Path = Field(description="directory of the dataset to write")
    teacher: str = Field(
        "extractive",
        description="extractive: facts stated in the corpus, asked in several ways, no model needed; worksheets: word problems with "
        "checked solutions; or a model: nano, a directory, a Hub id, a run, or http://host:port/v1#model (key from OPENAI_API_KEY)",
    )
    kind: Literal["qa", "conversation", "summary", "reasoning", "instruction", "rewrite", "preference"] = Field(
        "qa",
        description="what a model writes: questions with quoted evidence, conversations, summaries, answers with their reasoning "
        "(of a corpus, or added to the rows of data), instructions, new rows like those of data, or better and worse answers to them",
    )
    task: str = Field("", max_length=8000, description="what the rows are for, in your own words; the teacher reads it as it stands")
    rows: int | None = Field(None, ge=1, le=10_000_000, description="accepted training rows; none = all or 1000; a model needs a number")
    test_rows: int | None = Field(None, ge=0, description="test rows, in words or templates that training never sees; none = all or 200")
    test_share: float = Field(0.0, ge=0, le=0.5, description="documents a model keeps whole for testing; they give share x rows test rows")
    levels: tuple[Annotated[int, Field(ge=1, le=5)], ...] = Field((1, 2, 3), min_length=1, description="steps of the worksheets, 1 to 5")
    temperature: float = Field(0.7, ge=0, le=2, description="how freely the teacher chooses words")
    top_p: float = Field(0.95, gt=0, le=1, description="share of likely words the teacher chooses from")
    max_tokens: int = Field(4096, ge=16, description="longest reply, in tokens; a local model takes what fits")
    batch: int = Field(32, ge=1, le=4096, description="prompts planned at once; what they bring decides the next ones")
    concurrency: int = Field(8, ge=1, le=256, description="requests to the teacher at once")
    max_calls: int | None = Field(None, ge=1, description="calls after which to stop, judge included; none = no cap")
    max_tokens_spent: int | None = Field(None, ge=1, description="tokens, read and written, after which to stop; none = no cap")
    max_cost: float | None = Field(None, gt=0, description="cost after which to stop, in the currency of the prices; none = no cap")
    price_per_million_in: float = Field(0.0, ge=0, description="price of a million tokens the teacher or judge reads")
    price_per_million_out: float = Field(0.0, ge=0, description="price of a million tokens the teacher or judge writes")
    judge: str | None = Field(None, description="model that rates the answers of preference; none = the teacher")
    samples: int = Field(4, ge=2, le=32, description="answers to each question of preference")
    margin: float = Field(2.0, gt=0, le=10, description="least difference of the ratings (0 to 10) of a better and a worse answer")
    seed: int = Field(0, ge=0, lt=2**63, description="seed of everything that is drawn")

    @model_validator(mode="after")
    def _fits_teacher(self) -> Self:
        if self.teacher == "extractive" and self.corpus is None:
            raise ValueError("teacher extractive reads a corpus: give --corpus DIR (write one with `garage ingest`)")
        if self.teacher == "worksheets" and self.corpus is not None:
            raise ValueError("teacher worksheets reads no corpus: leave --corpus out")
        is_model, shared = self.teacher not in ("extractive", "worksheets"), {"corpus", "out", "teacher", "rows", "seed"}
        others = {"test_rows", "levels"} if is_model else set(type(self).model_fields) - shared - {"test_rows", "levels"}
        if given := sorted(name for name in others if getattr(self, name) != type(self).model_fields[name].default):
            raise ValueError(f"teacher {self.teacher} has no use for: {', '.join(given)}")
        if is_model:
            self._fits_model()
        return self

    def _fits_model(self) -> None:
        """Refuse what a model cannot be asked."""
        if self.rows is None:
            raise ValueError("a model writes as many rows as are asked for: give --rows N")
        if self.teacher.startswith(("http://", "https://")) and "#" not in self.teacher:
            raise ValueError("which model of that endpoint? write http://host:port/v1#model")
        if (self.corpus is None) == (self.data is None):
            raise ValueError("a model reads either a corpus or a dataset: give one of --corpus and --data")
        if (reads := {"rewrite": "data", "preference": "data", "reasoning": ""}.get(self.kind, "corpus")) and getattr(self, reads) is None:
            raise ValueError(f"kind {self.kind} is made from a {reads.replace('data', 'dataset')}: give --{reads}")
        if self.kind == "preference" and self.temperature == 0:
            raise ValueError("kind preference compares different answers, and temperature 0 gives the same one every time")
        if self.kind != "preference" and (self.judge, self.samples, self.margin) != (None, 4, 2.0):
            raise ValueError("judge, samples and margin belong to kind preference only")
        if self.max_cost is not None and not self.price_per_million_in + self.price_per_million_out:
            raise ValueError("max_cost needs price_per_million_in or price_per_million_out")
