"""Settings of `serve` and of the engine; names are vLLM's where vLLM has one."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, SecretStr, field_validator, model_validator

from garage.specs.base import Spec

LOOPBACK = ("127.0.0.1", "::1", "localhost")


class NoSpeculationSpec(Spec):
    """One token a step."""

    kind: Literal["off"] = Field("off", description="no guesses")


class GuessSpec(Spec):
    """What every kind of guessing has."""

    num_speculative_tokens: int = Field(4, ge=1, le=16, description="tokens guessed at once; a step checks them all")
    adaptive: bool = Field(True, description="measure steps with and without guesses, and guess only where it is quicker")


class NgramSpec(GuessSpec):
    """Guess what followed the last words where they stood before."""

    kind: Literal["ngram"] = Field("ngram", description="guesses from the text itself")
    prompt_lookup_max: int = Field(4, ge=1, le=32, description="longest end of the text that is looked up")
    prompt_lookup_min: int = Field(2, ge=1, le=32, description="shortest end of the text that is looked up")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.prompt_lookup_min > self.prompt_lookup_max:
            raise ValueError("prompt_lookup_min is above prompt_lookup_max")
        return self


class DraftSpec(GuessSpec):
    """Guess with a smaller model that has the same tokenizer."""

    kind: Literal["draft"] = Field("draft", description="guesses by a smaller model")
    model: str = Field(description="the smaller model: a directory, a Hub id, a run, or nano")
    kv_cache_bytes: int = Field(1 << 28, ge=1 << 16, description="memory of its own key/value cache")


SpeculationSpec = Annotated[NoSpeculationSpec | NgramSpec | DraftSpec, Field(discriminator="kind")]


class EngineSpec(Spec):
    """The engine: how many pages, how many requests and tokens at once."""

    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="precision of the weights; auto = as stored")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where the model runs; auto takes a GPU when there is one")
    quantization: Literal["none", "int8", "int4", "fp8"] = Field("none", description="bits of the matrices, the head's too; "
        "faster, answers change a little; fp8 (e4m3, products in 8 bits) is for GPUs from sm_89 on")  # fmt: skip
    page_size: int = Field(16, ge=1, le=256, description="tokens of one cache page")
    num_pages: int | None = Field(None, ge=2, description="cache pages; none = from kv_cache_bytes")
    kv_cache_bytes: int = Field(1 << 30, ge=1 << 16, description="memory of the key/value cache")
    kv_cache_dtype: Literal["auto", "fp8"] = Field("auto", description="numbers of the cache: auto = as the weights, fp8 = e4m3 with "
                                                   "scale 1, a half of bf16's memory; answers change a little")  # fmt: skip
    enforce_eager: bool = Field(False, description="on a GPU: launch every kernel of a step by itself, without CUDA graphs")
    max_model_len: int | None = Field(None, ge=2, description="longest prompt and answer together; none = what the model allows")
    max_num_seqs: int = Field(64, ge=1, le=4096, description="requests running at once")
    max_num_batched_tokens: int = Field(1024, ge=1, description="tokens of one step; long prompts are read in pieces of at most this many")
    max_waiting: int = Field(1024, ge=1, description="requests waiting at once; more are refused with 429")
    max_waiting_tokens: int = Field(1 << 20, ge=1, description="prompt tokens of all requests that wait; more are refused with 429")
    enable_lora: bool = Field(False, description="let adapters be loaded over the base, each request under its own or none")
    max_loras: int = Field(8, ge=1, le=256, description="adapters loaded at once")
    max_lora_rank: int = Field(64, ge=1, le=1024, description="largest rank of an adapter; one of a larger rank is refused")
    enable_prefix_caching: bool = Field(True, description="keep the pages of earlier prompts and use them again")
    async_scheduling: bool | None = Field(None, description="begin a step before the tokens of the one before are read; no text changes; "
                                          "none = on a GPU")  # fmt: skip
    speculation: SpeculationSpec = Field(NoSpeculationSpec(), description="tokens guessed ahead and checked together; no text changes")


class TemplateSpec(Spec):
    """What the chat template is told when a request does not say."""

    enable_thinking: bool | None = Field(None, description="reasoning of models that can turn it on and off; none = as the template does")


class ServeSpec(Spec):
    """Serve a model over the OpenAI API."""

    positional: ClassVar[tuple[str, ...]] = ("model",)
    model: str = Field(description="model to serve: a directory in the Hub's layout, a Hub id, a run, or nano")
    host: str = Field("127.0.0.1", description="address to listen on; anything but loopback needs an api_key")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 = any free one")
    api_key: tuple[SecretStr, ...] = Field((), repr=False, description="keys, one of which every request must carry but for /health, "
                                           "/ready and /ping; empty = none")  # fmt: skip
    api_keys_file: Path | None = Field(None, description="file of keys with limits of their own: NAME KEY [requests=N] [tokens=N] "
                                       "[concurrency=N] [admin], requests and tokens a minute")  # fmt: skip
    share_prefix_cache: bool = Field(False, description="let several keys share cached prompts; how quick an answer is then tells one "
                                     "key what another has asked")  # fmt: skip
    allowed_hosts: tuple[str, ...] = Field((), description="names the server is called by besides loopback's; on another address, with "
                                           "none given, any name")  # fmt: skip
    allowed_origins: tuple[str, ...] = Field((), description="web origins whose pages may call the API (CORS), or *; empty = none")
    served_model_name: str = Field("", description="name in /v1/models; empty = the directory's name")
    system: str = Field("", description="system prompt put before conversations that have none")
    generation_config: Literal["auto", "vllm"] = Field("auto", description="sampling defaults: auto = the model's "
                                                       "generation_config.json, vllm = OpenAI's own")  # fmt: skip
    tool_call_parser: Literal["auto", "hermes", "gemma3", "none"] = Field("auto", description="how the model writes calls of functions; "
                                                                          "auto = as its chat template shows")  # fmt: skip
    reasoning_parser: Literal["auto", "qwen3", "none"] = Field("auto", description="tell <think> blocks apart from the answer; auto = if "
                                                               "the chat template knows them")  # fmt: skip
    default_chat_template_kwargs: TemplateSpec = Field(TemplateSpec(), description="what the chat template is told by default")
    trust_request_chat_template: bool = Field(False, description="run chat templates that come in requests (in a process of their own)")
    lora_modules: tuple[str, ...] = Field((), description="adapters to load, each name=DIRECTORY, run or Hub id; requests name it as model")
    allow_runtime_lora: bool = Field(False, description="load and unload adapters over HTTP: by admin keys or, without any key, from "
                                     "this machine")  # fmt: skip
    lora_directory: Path | None = Field(None, description="the only directory below which adapters may be loaded over HTTP")
    max_body_bytes: int = Field(8 << 20, ge=1024, le=1 << 30, description="largest request body; a larger one is refused with 413")
    queue_timeout_seconds: float = Field(300, gt=0, description="a request that has not started by then ends with 503")
    stall_seconds: float = Field(60, gt=0, description="/health fails when work is queued and no step has ended for this long")
    stream_seconds: float = Field(0.04, ge=0, le=1, description="streamed tokens are written together, at most this often; first and last "
                                  "ones do not wait")  # fmt: skip
    drain_seconds: int = Field(30, ge=0, description="how long running answers may go on after a signal to stop")
    engine: EngineSpec = Field(EngineSpec(), description="the engine")

    @field_validator("api_key", mode="before")
    @classmethod
    def _several(cls, value: object) -> object:
        return ((value,) if value else ()) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _safe(self) -> Self:
        if self.host not in LOOPBACK and not self.api_key and self.api_keys_file is None:
            raise ValueError(f"listening on {self.host} without api_key would let anyone on the network use the model; set --api_key")
        if any(not key.get_secret_value() for key in self.api_key):
            raise ValueError("api_key is empty")
        if self.allow_runtime_lora and self.lora_directory is None:
            raise ValueError("allow_runtime_lora needs lora_directory, below which the adapters are")
        return self
