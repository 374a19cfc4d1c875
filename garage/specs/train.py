"""Settings of training: the model, the adapter, the optimizer, the schedule, the batch, and the verbs `pretrain` and `sft`.

Units: lengths and batches in tokens, rates per optimizer step, seeds any whole number below 2^63.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from garage.specs.base import Spec

StopName = Literal["end", "begin", "begin_twice", "masked", "cut", "template"]
"""What keeps a fine-tuning from starting (`data.validate`)."""
Rung = Literal["micro", "checkpointing", "tile", "offload", "length", "rank", "dora", "targets"]
"""What memory can be won by (`train.ladder`): the first four change no result."""
RUNGS: tuple[Rung, ...] = ("micro", "checkpointing", "tile", "offload", "length", "rank", "dora", "targets")
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoRASpec(Spec):
    """Low-rank adapters on the linear layers; the base stays frozen."""

    kind: Literal["lora"] = Field("lora", description="adapter kind")
    rank: int = Field(16, ge=1, le=1024, description="width r of the low-rank product")
    alpha: float = Field(32.0, gt=0, description="strength; the update is scaled by alpha / rank, or alpha / sqrt(rank) with rslora")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout on the adapter's input")
    targets: tuple[str, ...] = Field(
        LINEARS, min_length=1, description="linears to adapt: suffixes, full names, or all-linear, attention, mlp, qv"
    )
    rank_pattern: Mapping[str, Annotated[int, Field(ge=1, le=1024)]] = Field(
        {}, description="rank of some of the linears, by suffix or full name: --adapter.rank_pattern.q_proj 32"
    )
    alpha_pattern: Mapping[str, Annotated[float, Field(gt=0)]] = Field(
        {}, description="alpha of some of the linears, by suffix or full name: --adapter.alpha_pattern.q_proj 64"
    )
    rslora: bool = Field(False, description="scale by alpha / sqrt(rank) (rsLoRA, arXiv 2312.03732)")
    dora: bool = Field(False, description="train a length for each output row beside its direction (DoRA, arXiv 2402.09353)")
    quantize: Literal["none", "nf4", "int8"] = Field(
        "none", description="bits of the frozen linears: nf4 holds them in 4.1 a weight (QLoRA, arXiv 2305.14314), int8 in 8"
    )
    embedding: Literal["none", "int8"] = Field("none", description="int8 holds the frozen embedding and head in 8 bits a weight")
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="precision the adapter is held in; bfloat16 halves it and its gradient, rounds at random, and needs adamw8"
    )
    start: Literal["zero", "pissa", "loftq"] = Field(
        "zero",
        description="zero: a new adapter changes nothing; pissa: it takes over the strongest directions of each matrix (arXiv 2404.02948); "
        "loftq: it takes over what quantising loses (arXiv 2310.08659)",
    )
    loftq_iterations: int | None = Field(None, ge=1, le=10, description="rounds of quantising and factoring (loftq only); none = 1")

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.dora and self.start != "zero":
            raise ValueError(f"dora and start {self.start} do not go together: DoRA's lengths are those of the unchanged matrix")
        if self.start == "loftq" and self.quantize == "none":
            raise ValueError("start loftq makes up for quantising: it needs quantize nf4 or int8")
        if self.loftq_iterations is not None and self.start != "loftq":
            raise ValueError("loftq_iterations belongs to start loftq")
        return self


class FullSpec(Spec):
    """Train every weight."""

    kind: Literal["full"] = Field("full", description="no adapter: every weight is trained")


AdapterSpec = Annotated[LoRASpec | FullSpec, Field(discriminator="kind")]


class AdamWSpec(Spec):
    """AdamW (Loshchilov & Hutter, arXiv 1711.05101)."""

    kind: Literal["adamw"] = Field("adamw", description="optimizer kind")
    lr: float = Field(2e-4, gt=0, le=1, description="peak learning rate")
    beta1: float = Field(0.9, ge=0, lt=1, description="decay of the gradient's running mean")
    beta2: float = Field(0.99, ge=0, lt=1, description="decay of the squared gradient's running mean")
    eps: float = Field(1e-8, gt=0, description="added to the root of the second moment")
    weight_decay: float = Field(0.0, ge=0, description="decoupled decay of matrices; vectors are never decayed")
    lora_plus: float = Field(1.0, ge=1, description="learning rate of an adapter's B over its A's; 16 is usual (LoRA+, arXiv 2402.12354)")


class AdamW8Spec(AdamWSpec):
    """AdamW whose two running means are held in 8 bits (Dettmers et al., arXiv 2110.02861); tensors below 4,096 numbers keep 32."""

    kind: Literal["adamw8"] = Field("adamw8", description="optimizer kind")  # type: ignore[assignment]


class MuonSpec(Spec):
    """Muon on hidden matrices, AdamW on embeddings, norms and the head."""

    kind: Literal["muon"] = Field("muon", description="optimizer kind")
    lr: float = Field(0.02, gt=0, le=1, description="peak learning rate of the hidden matrices")
    momentum: float = Field(0.95, ge=0, lt=1, description="momentum of the hidden matrices, Nesterov")
    iterations: int = Field(5, ge=1, le=20, description="Newton-Schulz iterations")
    weight_decay: float = Field(0.0, ge=0, description="decoupled decay of the hidden matrices")
    adamw: AdamWSpec = Field(AdamWSpec(lr=1e-3), description="optimizer of everything that is not a hidden matrix")


OptimizerSpec = Annotated[AdamWSpec | AdamW8Spec | MuonSpec, Field(discriminator="kind")]


class ScheduleSpec(Spec):
    """Learning rate over the run, as a factor of the peak; ticks once per optimizer step."""

    kind: Literal["constant", "linear", "cosine", "wsd"] = Field("cosine", description="shape after warm-up; wsd = warm-up, stable, decay")
    warmup: float = Field(0.05, ge=0, le=1, description="share of all steps spent rising linearly from 0")
    floor: float = Field(0.0, ge=0, le=1, description="factor reached at the end (linear, cosine, wsd)")
    decay: float = Field(0.2, gt=0, le=1, description="share of all steps spent falling at the end (wsd only)")


class FitSpec(Spec):
    """The loop: how much is read, how it is batched, how often it is measured and saved."""

    epochs: float | None = Field(None, gt=0, description="passes over the training rows; give this or max_steps")
    max_steps: int | None = Field(None, ge=1, description="optimizer steps; where both are given it overrides epochs, and that is said")
    batch_tokens: int = Field(8192, ge=1, description="tokens in one optimizer step, packed, padding not counted")
    micro_tokens: int = Field(4096, ge=1, description="tokens in one forward pass; batch_tokens / micro_tokens passes are accumulated")
    max_length: int = Field(1024, ge=2, description="longest row in tokens; the rest of a longer row is cut, counted and reported")
    packing: bool = Field(
        True, description="lay rows end to end in a pass; false: one row or pair a pass, the same gradient many times slower, for debugging"
    )
    optimizer: OptimizerSpec = Field(AdamWSpec(), description="how gradients become updates")
    schedule: ScheduleSpec = Field(ScheduleSpec(), description="learning rate over the run")
    clip: float = Field(1.0, gt=0, description="largest gradient norm; a larger one is scaled down to it")
    neftune: float = Field(
        0.0, ge=0, description="alpha of the noise on input embeddings while training (NEFTune, arXiv 2310.05914); 5 is usual, 0 = none"
    )
    spike: float | None = Field(
        3.0, gt=1, description="stop when ten losses in a row exceed the median of the 50 before by this factor and 1 nat, and nine in ten "
        "of them; none = never. Ordinary steps scatter, some far, but not ten in a row",
    )
    dtype: Literal["float32", "bfloat16"] = Field("bfloat16", description="precision of matrix products; trained weights stay float32")
    checkpointing: Literal["auto", "all", "off"] = Field(
        "auto", description="layers that keep their input alone and compute the rest again in the backward; auto = as many as must"
    )
    tile: int | None = Field(None, ge=16, description="tokens of the MLP at once in layers that are computed again; none = all")
    offload: bool = Field(False, description="inputs of layers that are computed again wait in the host's memory (GPU only)")
    on_oom: tuple[Rung, ...] = Field(RUNGS, description="what is given up, in this order, when memory runs out; empty = stop at once")
    loss_chunk: int | None = Field(None, ge=16, description="rows of logits alive at once in the loss; none = as many as 32 MiB hold")
    eval_every: int = Field(100, ge=0, description="optimizer steps between evaluations on the held-out rows; 0 = only at the end")
    save_every: int = Field(100, ge=1, description="optimizer steps between checkpoints")
    keep: int = Field(2, ge=1, description="checkpoints kept beside the best one")
    patience: int | None = Field(None, ge=1, description="stop after this many evaluations without improvement; none = never")
    min_delta: float = Field(0.0, ge=0, description="smallest fall of the held-out loss that counts as improvement")
    sharding: Literal["none", "full"] = Field(
        "none", description="under torchrun: none = every device holds all weights, full = each a part (FSDP2); one process holds all"
    )
    seed: int = Field(0, ge=0, lt=2**63, description="one seed; every consumer of randomness derives its own from it")
    threads: int | None = Field(None, ge=1, description="CPU threads; none = one per physical core")

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.epochs is None and self.max_steps is None:
            raise ValueError("give epochs or max_steps")
        if self.micro_tokens > self.batch_tokens:
            raise ValueError(f"micro_tokens {self.micro_tokens} is larger than batch_tokens {self.batch_tokens}")
        if self.max_length > self.micro_tokens:
            raise ValueError(f"a row of max_length {self.max_length} does not fit into micro_tokens {self.micro_tokens}")
        if self.checkpointing == "off" and (self.tile or self.offload):
            raise ValueError("tile and offload are for layers that are computed again; checkpointing is off")
        if self.sharding == "full" and self.optimizer.kind != "adamw":
            raise ValueError(f"optimizer {self.optimizer.kind} needs whole matrices: use adamw, or sharding none")
        return self


class TrainSpec(Spec):
    """What `pretrain` and `sft` share."""

    out: Path = Field(description="directory of the run")
    resume: Path | None = Field(None, description="directory of an interrupted run to go on with, under its own spec")
    eval_share: float = Field(0.05, ge=0, lt=1, description="share of documents held out where there is no eval split")
    fit: FitSpec = Field(description="the training loop")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where to train; auto takes a GPU when there is one")
    save_dtype: Literal["float32", "bfloat16"] = Field("bfloat16", description="precision of saved whole models; adapters keep float32")


class ArchitectureSpec(Spec):
    """A new model's shape; its weights are drawn from the seed."""

    family: Literal["qwen3", "gemma3"] = Field("qwen3", description="model family")
    hidden_size: int = Field(ge=8, description="model width D")
    intermediate_size: int = Field(ge=8, description="MLP width F")
    num_hidden_layers: int = Field(ge=1, description="layers")
    num_attention_heads: int = Field(ge=1, description="query heads N")
    num_key_value_heads: int = Field(ge=1, description="key/value heads M; divides the query heads")
    head_dim: int = Field(ge=2, description="head width H, even")
    tie_word_embeddings: bool = Field(True, description="one matrix for the embedding and the head")
    rope_theta: float = Field(10_000.0, gt=0, description="base of the rotary frequencies")
    sliding_window: int | None = Field(None, ge=1, description="attention window of the local layers (gemma3 only)")
    max_position_embeddings: int = Field(2048, ge=2, description="longest context the model is meant for")

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.num_attention_heads % self.num_key_value_heads:
            heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
            raise ValueError(f"num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd; rotary positions need pairs")
        if (self.sliding_window is not None) != (self.family == "gemma3"):
            raise ValueError("sliding_window belongs to gemma3, and gemma3 needs it")
        return self


class PretrainSpec(TrainSpec):
    """Train a language model on plain text or rows: a new one, or one that exists and goes on with its own tokenizer."""

    positional: ClassVar[tuple[str, ...]] = ("data",)
    data: tuple[Path, ...] = Field(min_length=1, description="text, JSONL, corpus or dataset artifacts to train on")
    model: str | None = Field(None, description="model to go on with: a directory, a Hub id, a run, or nano; none = a new one")
    adapter: AdapterSpec = Field(FullSpec(), description="what is trained; a new model is trained whole")
    tokenizer: Path | None = Field(None, description="directory of an existing tokenizer; none = train a BPE on the data (new model)")
    vocab_size: int = Field(4096, ge=300, le=1_000_000, description="size of the BPE to train, if no tokenizer is given (new model)")
    chat: Literal["chatml", "qwen3", "gemma3"] = Field("chatml", description="chat template that a new model is saved with")
    architecture: ArchitectureSpec | None = Field(None, description="shape of the new model")

    @model_validator(mode="after")
    def _one_model(self) -> Self:
        if (self.model is None) == (self.architecture is None):
            raise ValueError("give an architecture for a new model, or the model to go on with")
        if self.model is None and self.adapter.kind != "full":
            raise ValueError("an adapter belongs to a model that exists; a new one is trained whole")
        changed = [name for name in ("tokenizer", "vocab_size", "chat") if getattr(self, name) != type(self).model_fields[name].default]
        if self.model is not None and changed:
            raise ValueError(f"{changed[0]} belongs to a new model; {self.model} has its own tokenizer and chat template")
        return self


class TuneSpec(TrainSpec):
    """What `sft` and `dpo` share."""

    positional: ClassVar[tuple[str, ...]] = ("model",)
    model: str = Field(description="model to tune: a directory in the Hub's layout, a Hub id, a run, or nano")
    data: tuple[Path, ...] = Field(min_length=1, description="datasets: JSONL, CSV or dataset artifacts")
    adapter: AdapterSpec = Field(LoRASpec(), description="what is trained")
    thinking: bool | None = Field(None, description="thinking on or off, for families that have it; none = the template's default")
    system: str = Field("", description="system prompt put before every row that has none")
    allow: tuple[StopName, ...] = Field((), description="go on in spite of these faults of the rows; each is named where it stops a run")

    @model_validator(mode="after")
    def _shardable(self) -> Self:
        if self.fit.sharding == "full" and isinstance(self.adapter, LoRASpec) and self.adapter.quantize != "none":
            raise ValueError(f"a base in {self.adapter.quantize} is not shared out: use quantize none, or sharding none")
        return self


    @model_validator(mode="after")
    def _holds(self) -> Self:
        if isinstance(self.adapter, LoRASpec) and self.adapter.dtype == "bfloat16" and not isinstance(self.fit.optimizer, AdamW8Spec):
            raise ValueError("an adapter in bfloat16 needs fit.optimizer.kind adamw8, which rounds at random: else small updates are lost")
        return self


class SFTSpec(TuneSpec):
    """Fine-tune a model on conversations; only the assistant's tokens are learned."""

    data: tuple[Path, ...] = Field((), description="datasets: JSONL, CSV or dataset artifacts")
    adapters: Mapping[str, tuple[Path, ...]] = Field(
        {}, description="in place of data: the datasets of each of several adapters, trained in turn over one loaded base"
    )

    @model_validator(mode="after")
    def _one_or_several(self) -> Self:
        names = [name.casefold() for name in self.adapters]
        if self.data and self.adapters:
            raise ValueError("give data or adapters, not both")
        if not (self.data or self.adapters) or not all(self.adapters.values()):
            raise ValueError("data: required, but not given; or --adapters.NAME DATA for each of several adapters")
        if wrong := [name for name in self.adapters if not re.fullmatch(r"[A-Za-z0-9][\w.-]{0,99}", name)]:
            raise ValueError(f"the adapter name {wrong[0]!r} is no plain file name")
        if len(set(names)) < len(names):
            raise ValueError("two adapters have the same name but for case")
        if self.adapters and self.fit.sharding == "full":
            raise ValueError("several adapters take turns on a whole base; use sharding none")
        if self.adapters and (not isinstance(self.adapter, LoRASpec) or self.adapter.start != "zero"):
            raise ValueError("several adapters share a frozen base; kind full, or a start other than zero, would change it")
        return self


class PreferenceSpec(Spec):
    """How a better and a worse answer become a loss."""

    kind: Literal["sigmoid", "ipo", "robust", "length", "simpo"] = Field(
        "sigmoid",
        description="sigmoid: DPO; ipo: a squared distance, on means over tokens; robust: DPO for labels of which a share is wrong; "
        "length: DPO on means over tokens; simpo: means over tokens, without a reference",
    )
    beta: float = Field(0.1, gt=0, description="how strongly the reference holds; for simpo the scale of the margin (2 is usual)")
    smoothing: float = Field(0.0, ge=0, lt=0.5, description="share of the labels taken to be wrong (sigmoid, length, robust)")
    gamma: float | None = Field(None, ge=0, description="margin that the better answer must have (simpo); none = 0.5")
    rpo: float = Field(0.0, ge=0, description="weight of the better answer's own likelihood; 1 keeps it from falling (RPO)")

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.smoothing and self.kind in ("ipo", "simpo"):
            raise ValueError(f"smoothing has no meaning for {self.kind}")
        if self.gamma is not None and self.kind != "simpo":
            raise ValueError("gamma belongs to simpo")
        return self


class DistillSpec(TuneSpec):
    """Tune a model to say what a larger one would have said: its probabilities over all tokens are learned beside the answers."""

    teacher: str = Field(description="model to learn from, with the same vocabulary: a directory, a Hub id, a run, or nano")
    teacher_quantize: Literal["none", "nf4", "int8"] = Field("none", description="bits in which the teacher's linears are held")
    divergence: Literal["forward", "reverse", "js"] = Field(
        "forward", description="forward: cover all that the teacher may say; reverse: keep to what it says most; js: half of each (GKD)"
    )
    temperature: float = Field(1.0, gt=0, le=100, description="above 1 the teacher's unlikely tokens count for more")
    mix: float = Field(0.5, ge=0, le=1, description="weight of the teacher; the rest is that of the answers in the rows")


class DPOSpec(TuneSpec):
    """Tune a model on preferences: pairs of a better and a worse answer to the same prompt."""

    preference: PreferenceSpec = Field(PreferenceSpec(), description="the loss")
