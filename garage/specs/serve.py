"""Settings of `serve` and `chat`; names are vLLM's where vLLM has one."""

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from garage.specs.base import Spec


class EngineSpec(Spec):
    """The engine: how many pages, how many requests and tokens at once."""

    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="precision of the weights; auto = as stored")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where the model runs; auto takes a GPU when there is one")
    page_size: int = Field(16, ge=1, le=256, description="tokens of one cache page")
    num_pages: int | None = Field(None, ge=2, description="cache pages; none = from kv_cache_bytes")
    kv_cache_bytes: int = Field(1 << 30, ge=1 << 16, description="memory of the key/value cache")
    max_model_len: int | None = Field(None, ge=2, description="longest prompt and answer together; none = what the model allows")
    max_num_seqs: int = Field(64, ge=1, le=4096, description="requests running at once")
    max_num_batched_tokens: int = Field(1024, ge=1, description="tokens of one step; long prompts are read in pieces of at most this many")
    max_waiting: int = Field(1024, ge=1, description="requests waiting at once; more are refused with 503")
    max_waiting_tokens: int = Field(1 << 20, ge=1, description="prompt tokens of all requests that wait; more are refused with 503")
    enable_prefix_caching: bool = Field(True, description="keep the pages of earlier prompts and use them again")


class ServeSpec(Spec):
    """Serve a model over the OpenAI API."""

    positional: ClassVar[tuple[str, ...]] = ("model",)
    model: str = Field(description="model to serve: a directory in the Hub's layout, a Hub id, a run, or nano")
    host: str = Field("127.0.0.1", description="address to listen on; anything but loopback needs an api_key")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 = any free one")
    api_key: str = Field("", repr=False, description="key that every request but /health must carry; empty = none")
    served_model_name: str = Field("", description="name in /v1/models; empty = the directory's name")
    system: str = Field("", description="system prompt put before conversations that have none")
    max_body_bytes: int = Field(8 << 20, ge=1024, le=1 << 30, description="largest request body; a larger one is refused with 413")
    stall_seconds: float = Field(60, gt=0, description="/health fails when work is queued and no step has ended for this long")
    drain_seconds: int = Field(30, ge=0, description="how long running answers may go on after a signal to stop")
    engine: EngineSpec = Field(EngineSpec(), description="the engine")

    @model_validator(mode="after")
    def _safe(self) -> Self:
        if self.host not in ("127.0.0.1", "::1", "localhost") and not self.api_key:
            raise ValueError(f"listening on {self.host} without api_key would let anyone on the network use the model; set --api_key")
        return self


class ChatSpec(Spec):
    """Talk to a model in the terminal."""

    positional: ClassVar[tuple[str, ...]] = ("model",)
    model: str = Field(description="model to talk to")
    system: str = Field("", description="system prompt")
    temperature: float = Field(0.7, ge=0, le=10, description="0 is greedy")
    max_tokens: int = Field(512, ge=1, description="longest answer, in tokens")
    engine: EngineSpec = Field(EngineSpec(max_num_seqs=1), description="the engine")
