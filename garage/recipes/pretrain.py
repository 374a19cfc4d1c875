"""`garage pretrain`: texts -> tokenizer -> tokens -> a model from scratch -> an artifact the whole stack can use.

With `model` an existing one goes on learning texts, every token of them, with its own tokenizer and chat template.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace

from garage.core.events import Listener
from garage.core.seeds import derive
from garage.core.types import Row
from garage.data.encode import Encoding
from garage.models.config import Config
from garage.models.families import build, from_architecture, init_weights
from garage.models.layers import Model
from garage.models.weights import pick_device
from garage.recipes.afford import fit_within_memory
from garage.recipes.rows import encode, estimate, split_of
from garage.recipes.run import Run, open_run
from garage.recipes.trained import Trained, summary, write_model
from garage.recipes.tune import model_for, weights_of, whole_model, write
from garage.specs.train import FitSpec, PretrainSpec
from garage.tokens.bpe import train_bpe
from garage.tokens.chat import Chat
from garage.tokens.tokenizer import Tokenizer
from garage.tokens.voice import Voice
from garage.train.loop import Fitted, fit, prepare
from garage.train.parallel import leading


def pretrain(spec: PretrainSpec, *listeners: Listener) -> Trained:
    """Train a model, a new one or one that exists, on texts and conversations; every token is learned.

    Raises:
        UserError: unreadable data, a loss that is not finite, a full disk.
        KeyboardInterrupt: after a checkpoint; `resume` goes on.
    """
    source = None if spec.model is None else whole_model(spec.model)
    with open_run("pretrain", spec, *listeners) as run:
        with leading(f"data {run.path}"):
            chain, split = split_of(spec.data, spec.eval_share, derive(spec.fit.seed, "split"))
            voice = _voice(spec, run, split.train) if source is None else Voice.load(source.base)
            how = Encoding(voice.tokenizer, voice.chat, spec.fit.max_length, learn_all=True)
            train, held = encode(run, split, how, chain=chain)
        model = _new_model(spec, voice) if source is None else model_for(run, spec, source)

        def fitting(settings: FitSpec) -> Fitted:
            return fit(model, train=train, held=held, spec=settings, run=run.path, events=run.events)

        fitted, spec = fit_within_memory(run, model, train, spec, fitting)
        place = write_model(run, model, voice, spec) if source is None else write(run, model, voice, spec, source)
        return summary(run, place, fitted)


def plan(spec: PretrainSpec) -> dict[str, object]:
    """Parameters of the model, and how long it would be trained; of a new tokenizer nobody can say how many tokens it will make."""
    if spec.model is not None:
        source = whole_model(spec.model)
        voice = Voice.load(source.base)
        how = Encoding(voice.tokenizer, voice.chat, spec.fit.max_length, learn_all=True)
        return weights_of(spec, source) | estimate(spec, spec.data, how)
    tokenizer = None if spec.tokenizer is None else Tokenizer.load(spec.tokenizer)
    size = spec.vocab_size if tokenizer is None else tokenizer.vocab_size
    parameters = sum(weight.numel() for weight in build(_config(spec, size), device="meta").parameters())
    plan: dict[str, object] = {"parameters": parameters, "tokens per step": spec.fit.batch_tokens, "steps": spec.fit.max_steps}
    if tokenizer is None:
        return plan
    how = Encoding(tokenizer, Chat.named(spec.chat, tokenizer), spec.fit.max_length, learn_all=True)
    return plan | estimate(spec, spec.data, how)


def _config(spec: PretrainSpec, vocab_size: int) -> Config:
    assert spec.architecture is not None, "the spec asks for a new model"
    shape = spec.architecture.model_dump()
    return from_architecture(shape.pop("family"), vocab_size=vocab_size, **shape)


def _voice(spec: PretrainSpec, run: Run, rows: Iterable[Row]) -> Voice:
    """The tokenizer that is given, or one trained on the texts; kept in the run, so that a resumed run has the same."""
    place = run.path / "tokenizer"
    if not place.exists():
        if spec.tokenizer is not None:
            tokenizer = Tokenizer.load(spec.tokenizer)
        else:
            run.events.emit("stage", name="tokenizer", detail=f"training a BPE of {spec.vocab_size} tokens")
            context = _config(spec, spec.vocab_size).max_position_embeddings
            tokenizer = train_bpe(_texts(rows), vocab_size=spec.vocab_size, family=spec.chat, context=context)
        Voice(tokenizer, Chat.named(spec.chat, tokenizer)).save(place)
    return Voice.load(place)


def _texts(rows: Iterable[Row]) -> Iterator[str]:
    for row in rows:
        yield from [row.text] if row.text else [message.content for message in row.messages]


def _new_model(spec: PretrainSpec, voice: Voice) -> Model:
    config, device = _config(spec, voice.tokenizer.vocab_size), pick_device(spec.device)
    model = build(replace(config, eos_token_id=voice.end_ids), device="cpu" if spec.fit.sharding == "full" else device)
    init_weights(model, derive(spec.fit.seed, "weights"))
    prepare(model, spec.fit, device)
    return model
