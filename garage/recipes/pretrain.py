"""`garage pretrain`: texts -> tokenizer -> tokens -> a model from scratch -> an artifact the whole stack can use."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

from garage.core.events import Listener
from garage.core.seeds import derive
from garage.core.types import Row
from garage.data.encode import Encoding
from garage.models.families import build, from_architecture, init_weights
from garage.models.layers import Model
from garage.models.weights import pick_device
from garage.recipes.rows import encode, split_of
from garage.recipes.run import Run, open_run
from garage.recipes.trained import Trained, summary, write_model
from garage.specs.train import PretrainSpec
from garage.tokens.bpe import train_bpe
from garage.tokens.chat import Chat
from garage.tokens.tokenizer import Tokenizer
from garage.tokens.voice import Voice
from garage.train.loop import fit, prepare
from garage.train.parallel import leading


def pretrain(spec: PretrainSpec, *listeners: Listener) -> Trained:
    """Train a new model on texts and conversations; every token is learned.

    Raises:
        UserError: unreadable data, a loss that is not finite, a full disk.
        KeyboardInterrupt: after a checkpoint; `resume` goes on.
    """
    with open_run("pretrain", spec, *listeners) as run:
        with leading(f"data {run.path}"):
            chain, split = split_of(spec.data, spec.eval_share, derive(spec.fit.seed, "split"))
            voice = _voice(spec, run, split.train)
            how = Encoding(voice.tokenizer, voice.chat, spec.fit.max_length, learn_all=True)
            train, held = encode(run, split, how, chain=chain)
        model = _new_model(spec, voice)
        fitted = fit(model, train=train, held=held, spec=spec.fit, run=run.path, events=run.events)
        return summary(run, write_model(run, model, voice, spec), fitted)


def plan(spec: PretrainSpec) -> dict[str, object]:
    """Parameters of the model that would be made."""
    shape = spec.architecture.model_dump()
    config = from_architecture(shape.pop("family"), vocab_size=spec.vocab_size, **shape)
    model = build(config, device="meta")
    return {"parameters": sum(p.numel() for p in model.parameters()), "tokens per step": spec.fit.batch_tokens, "steps": spec.fit.max_steps}


def _voice(spec: PretrainSpec, run: Run, rows: Iterable[Row]) -> Voice:
    """The tokenizer that is given, or one trained on the texts; kept in the run, so that a resumed run has the same."""
    place = run.path / "tokenizer"
    if not place.exists():
        if spec.tokenizer is not None:
            tokenizer = Tokenizer.load(spec.tokenizer)
        else:
            run.events.emit("stage", name="tokenizer", detail=f"training a BPE of {spec.vocab_size} tokens")
            context = spec.architecture.max_position_embeddings
            tokenizer = train_bpe(_texts(rows), vocab_size=spec.vocab_size, family=spec.chat, context=context)
        Voice(tokenizer, Chat.named(spec.chat, tokenizer)).save(place)
    return Voice.load(place)


def _texts(rows: Iterable[Row]) -> Iterator[str]:
    for row in rows:
        yield from [row.text] if row.text else [message.content for message in row.messages]


def _new_model(spec: PretrainSpec, voice: Voice) -> Model:
    shape = spec.architecture.model_dump()
    config = from_architecture(shape.pop("family"), vocab_size=voice.tokenizer.vocab_size, **shape)
    device = pick_device(spec.device)
    model = build(replace(config, eos_token_id=voice.end_ids), device="cpu" if spec.fit.sharding == "full" else device)
    init_weights(model, derive(spec.fit.seed, "weights"))
    prepare(model, spec.fit, device)
    return model
