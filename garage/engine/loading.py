"""From directories to what the engine needs: weights, tokenizer, chat template, the authors' defaults.

An adapter is folded into the weights as they load, so that the model serves at full speed; its tokenizer and template, where it has
them, replace those of the base. The template must be the one the model was trained with: a manifest that names another is refused,
because a model that sees another format at serving time fails silently.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from garage.core.artifact import stated
from garage.core.errors import UserError
from garage.core.files import read_object
from garage.engine.defaults import GenerationDefaults, read_defaults
from garage.models.adapters import attach, merge
from garage.models.fuse import fuse, held, lay_out
from garage.models.layers import Model
from garage.models.weights import load_model, pick_device
from garage.specs.serve import DraftSpec, EngineSpec
from garage.store.locate import locate
from garage.tokens.chat import Chat
from garage.tokens.tokenizer import Tokenizer

T = TypeVar("T")


@dataclass(frozen=True)
class Loaded:
    """A model ready to run; `chat` is None when it has no template."""

    model: Model
    tokenizer: Tokenizer
    chat: Chat | None
    defaults: GenerationDefaults
    base: Path


def load(base: Path, adapter: Path | None, settings: EngineSpec, *, tell: Callable[[str], None] = lambda phase: None) -> Loaded:
    """Read everything; the cheap checks come before the weights. `tell` hears what begins.

    Raises:
        UserError: a file is missing or damaged, or the template is not the one the model was trained with.
    """
    tell("tokenizer")
    place = adapter if adapter is not None and (adapter / "tokenizer.json").exists() else base
    tokenizer = Tokenizer.load(place)
    template_place = next((directory for directory in (place, base) if has_template(directory)), None)
    chat = Chat.load(template_place, tokenizer) if template_place is not None else None
    check_template(adapter or base, chat)
    defaults = read_defaults(base)
    device = pick_device(settings.device)
    dtype = None if settings.dtype == "auto" else getattr(torch, settings.dtype)
    tell("weights")
    bits = stated(adapter, "quantize") if adapter is not None else partial(held, quantization=settings.quantization, on_cpu=device == "cpu")
    model = load_model(base, dtype=dtype, device=device, quantize=bits)
    if adapter is not None:
        model = merge(attach(model, adapter))
    tell("layout")
    model = lay_out(model, settings.quantization)
    if not settings.enable_lora:  # adapters go over the linears by their names
        model = fuse(model)
    return Loaded(model.eval().requires_grad_(False), tokenizer, chat, defaults, base)


def check_template(place: Path, chat: Chat | None) -> None:
    """Refuse a directory whose manifest names another chat template than the one that would be used."""
    trained, used = stated(place, "template_hash"), chat.hash if chat is not None else "none"
    if trained not in ("", used):
        text = f"{place} was trained with the chat template {trained}, but its files give {used}; it would answer badly"
        raise UserError(text, remedy="restore its chat_template.jinja, or export the model again")


def has_template(place: Path) -> bool:
    """Whether a directory has a chat template of its own."""
    if any((place / name).exists() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    return bool(read_object(place / "tokenizer_config.json").get("chat_template"))


def load_draft(settings: EngineSpec, tokenizer: Tokenizer) -> Model | None:
    """The model that guesses, if the settings name one.

    Raises:
        UserError: there is none, or its tokens are others.
    """
    spec = settings.speculation
    if not isinstance(spec, DraftSpec):
        return None
    source = locate(spec.model)
    if source.adapter is not None or Tokenizer.load(source.base).hash != tokenizer.hash:
        text = f"{spec.model} cannot draft: it is an adapter, or its tokenizer is another than the model's"
        raise UserError(text, remedy="take a smaller model of the same family, merged")
    return load(source.base, None, settings).model


def apart(do: Callable[[], T]) -> T:
    """What `do` returns or raises, from a thread that ends with it.

    OpenMP's workers belong to the thread that called them and end with it. Were a model loaded by a thread that stays, its workers would
    stay beside those of the engine's thread; GNU's OpenMP then counts more threads than cores and lets every barrier sleep, which took a
    third of the speed of a small model.
    """
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(do())
        except BaseException as error:
            future.set_exception(error)

    thread = threading.Thread(target=work, name="garage-start", daemon=True)
    thread.start()
    thread.join()
    return future.result()
