"""From the fields of a request to what the engine is asked for: `Sampling` and `Structure`.

Defaults of a request: what `generation_config.json` of the model says, as vLLM does (unless the server was started with
generation_config = "vllm"); else temperature 1, top_p 1, no filters, no penalties. Without max_tokens an answer may fill the context.
"""

import json

from garage.core.seeds import derive
from garage.core.types import Sampling, Structure
from garage.engine.defaults import GenerationDefaults
from garage.serve.asks import MAX_SCHEMA, Ask, ChatAsk, TextAsk
from garage.serve.errors import ApiError

PLAIN_DEFAULTS = {
    "temperature": 1.0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
    "repetition_penalty": 1.0, "top_k": 0,
}  # fmt: skip


def sampling_of(asked: Ask, defaults: GenerationDefaults, room: int, choice: int, *, keep_special: bool = False) -> Sampling:
    """How to sample choice number `choice`; `room` is what the context leaves for the answer.

    `keep_special`: tags of reasoning and calls that are control tokens must reach the parsers.
    """
    values = {name: _first(getattr(asked, name), getattr(defaults, name, None), plain) for name, plain in PLAIN_DEFAULTS.items()}
    probs, prompt_probs = asked.num_logprobs(), asked.prompt_logprobs
    if isinstance(asked, TextAsk) and asked.candidates > asked.n:
        probs = probs or 0
    if isinstance(asked, TextAsk) and asked.echo and asked.logprobs is not None:
        prompt_probs = max(asked.logprobs, prompt_probs or 0)
    limit = _length(asked, defaults, room)
    return Sampling(
        max_tokens=limit, min_tokens=asked.min_tokens, top_k=max(int(values.pop("top_k")), 0), **values,
        logit_bias=tuple((int(i), bias) for i, bias in asked.logit_bias.items()), bad_words=tuple(asked.bad_words),
        allowed_token_ids=tuple(asked.allowed_token_ids), stop=(asked.stop,) if isinstance(asked.stop, str) else tuple(asked.stop),
        seed=asked.seed if asked.seed is None or choice == 0 else derive(asked.seed, "choice", choice),
        stop_token_ids=tuple(asked.stop_token_ids), include_stop=asked.include_stop_str_in_output, ignore_eos=asked.ignore_eos,
        skip_special=asked.skip_special_tokens and not keep_special, logprobs=probs,
        prompt_logprobs=0 if limit == 0 and prompt_probs is None else prompt_probs,
    )  # fmt: skip


def check_ids(asked: Ask, vocab_size: int) -> None:
    """Refuse token ids the model does not have."""
    given = {"logit_bias": map(int, asked.logit_bias), "allowed_token_ids": asked.allowed_token_ids, "stop_token_ids": asked.stop_token_ids}
    for param, ids in given.items():
        wrong = next((i for i in ids if i >= vocab_size), None)
        if wrong is not None:
            raise ApiError(400, f"{param}: the model has no token {wrong}, only {vocab_size}", param=param)


def check_fits(num_prompt: int, num_new: int, longest: int, param: str) -> None:
    """Refuse what cannot fit the context, with both numbers."""
    if num_prompt + num_new > longest:
        text = f"{num_prompt} prompt tokens and {num_new} new ones make {num_prompt + num_new}, but this model is served with at most"
        raise ApiError(400, f"{text} {longest}; shorten the prompt or lower max_tokens", param=param, code="context_length_exceeded")


def check_length(asked: Ask, num_prompt: int, max_model_len: int, param: str) -> None:
    """Refuse what cannot fit the context, and a length that asks for nothing."""
    limit = _asked_length(asked)
    check_fits(num_prompt, 1 if limit is None else limit, max_model_len, param)
    scores = asked.prompt_logprobs is not None or (isinstance(asked, TextAsk) and asked.echo)
    if limit == 0 and not scores:
        raise ApiError(400, "max_tokens: 0 is only allowed with echo or prompt_logprobs", param="max_tokens")
    if limit is not None and asked.min_tokens > limit:
        raise ApiError(400, f"min_tokens: {asked.min_tokens} is more than max_tokens, {limit}", param="min_tokens")


def structure_of(asked: Ask) -> Structure | None:
    """The form the answer must have, None if free."""
    wanted = asked.structured_outputs
    if wanted is not None:
        forms = {"json": wanted.json_, "regex": wanted.regex, "choice": wanted.choice, "grammar": wanted.grammar,
                 "json_object": wanted.json_object or None}  # fmt: skip
        given = [(kind, value) for kind, value in forms.items() if value is not None]
        if len(given) != 1:
            raise ApiError(400, "structured_outputs: give one of json, regex, choice, grammar, json_object", param="structured_outputs")
        return _structure(*given[0], "structured_outputs")
    shape = asked.response_format
    if shape.json_schema is not None:
        return _structure("json", shape.json_schema.schema_, "response_format")
    return _structure("json_object", True, "response_format") if shape.type == "json_object" else None


def _structure(kind: str, value: object, param: str) -> Structure:
    if kind == "json_object":
        return Structure("json", '{"type": "object"}')
    text = value if isinstance(value, str) else json.dumps(value)
    if len(text) > MAX_SCHEMA:
        raise ApiError(400, f"{param}: it is longer than {MAX_SCHEMA} characters", param=param)
    assert kind in ("json", "regex", "choice", "grammar"), kind
    return Structure(kind, text)  # type: ignore[arg-type]


def _asked_length(asked: Ask) -> int | None:
    return asked.max_completion_tokens if isinstance(asked, ChatAsk) and asked.max_tokens is None else asked.max_tokens


def _length(asked: Ask, defaults: GenerationDefaults, room: int) -> int:
    limit = _asked_length(asked)
    return max(1, min(room, defaults.max_new_tokens or room)) if limit is None else limit


def _first(asked: float | None, default: float | None, otherwise: float) -> float:
    return next(value for value in (asked, default, otherwise) if value is not None)
