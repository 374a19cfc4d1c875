"""What the authors of a model say about generating with it: `generation_config.json`.

The end-of-sequence ids hold for every request. The sampling values are defaults for the server only, applied as vLLM does: a
field that the request gives wins, then this file, then OpenAI's own default (temperature 1, no filters). Requests made in
Python say what they want and never see them. Values with no effect on us (`do_sample`, beams, cache settings) are left out;
one that would change the text and is not honoured is named in `ignored`.
"""

from dataclasses import dataclass
from pathlib import Path

from garage.core.files import damaged, read_object

NUMBERS = ("temperature", "top_p", "min_p", "typical_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
COUNTS = ("top_k", "max_new_tokens")
UNKNOWN_EFFECT = {"no_repeat_ngram_size": 0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0}


@dataclass(frozen=True)
class GenerationDefaults:
    """Values of generation_config.json; None where it says nothing."""

    eos_ids: frozenset[int] = frozenset()
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    max_new_tokens: int | None = None
    ignored: tuple[str, ...] = ()


def read_defaults(directory: Path) -> GenerationDefaults:
    """The defaults of the model in `directory`; empty ones when it has no generation_config.json.

    Raises:
        UserError: the file is damaged or a value is of the wrong kind.
    """
    path = directory / "generation_config.json"
    raw = read_object(path)
    try:
        eos = raw.get("eos_token_id")
        numbers = {name: _number(raw, name) for name in NUMBERS}
        top_k, limit = (None if (value := _number(raw, name)) is None else int(value) for name in COUNTS)
        eos_ids = frozenset(map(int, eos if isinstance(eos, list) else [] if eos is None else [eos]))
        ignored = tuple(name for name, neutral in UNKNOWN_EFFECT.items() if raw.get(name, neutral) not in (None, neutral))
        return GenerationDefaults(eos_ids, top_k=top_k, max_new_tokens=limit, ignored=ignored, **numbers)
    except (ValueError, TypeError) as error:
        raise damaged(str(path), error) from error


def _number(raw: dict[str, object], name: str) -> float | None:
    value = raw.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} is {value!r}, not a number")
    return float(value)
