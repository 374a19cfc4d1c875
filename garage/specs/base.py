"""What a spec is: every setting a person can make for one verb, frozen, strict and explained.

A spec refuses unknown keys and impossible combinations when it is made, not while it runs. Values come from a TOML file first and
from dotted options second (`--adapter.rank 32`). Every field has a description; it feeds the command line's help, the docs and
the web form. There are no aliases: a renamed field is an error that names the new one.
"""

import difflib
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Self, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from garage.core.errors import UserError

MAX_SPEC_BYTES = 1 << 20


class Spec(BaseModel):
    """Base of all specs."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)
    positional: ClassVar[tuple[str, ...]] = ()
    """Fields that may be given without their option name, in this order; a tuple field takes all that are left."""

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, values: object) -> object:
        """A table given in part is completed by the field's default, if it is of the same kind."""
        if not isinstance(values, Mapping):
            return values
        out = dict(values)
        for name, info in cls.model_fields.items():
            given, default = out.get(name), info.default
            if isinstance(given, Mapping) and isinstance(default, Spec) and given.get("kind") in (None, getattr(default, "kind", None)):
                out[name] = merge(default.model_dump(), given)
        return out

    @classmethod
    def parse(cls, values: Mapping[str, object], *, where: str = "options") -> Self:
        """A spec from plain values.

        Raises:
            UserError: a key is unknown, a value is of the wrong kind or out of range, or two settings exclude each other.
        """
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise _in_words(cls, error, where) from error

    @classmethod
    def read(cls, path: Path, overrides: Mapping[str, object] | None = None) -> Self:
        """A spec from a TOML (or resolved JSON) file, with `overrides` laid over it."""
        return cls.parse(merge(read_values(path), overrides or {}), where=str(path))

    def resolved(self) -> dict[str, object]:
        """All settings as plain JSON values; what is saved with a run."""
        return self.model_dump(mode="json")


def read_values(path: Path) -> dict[str, object]:
    """The plain values of a spec file; bounded in size, TOML unless its name ends in .json."""
    try:
        if path.stat().st_size > MAX_SPEC_BYTES:
            raise UserError(f"{path} is larger than {MAX_SPEC_BYTES} bytes", remedy="a spec is a short TOML file; is this the dataset?")
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except FileNotFoundError as error:
        raise UserError(f"there is no spec file {path}", remedy="check the path") from error
    except (ValueError, OSError) as error:
        raise UserError(f"{path} is not a readable spec: {error}", remedy="write it as TOML, UTF-8") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no table of settings", remedy="write it as TOML: key = value lines")
    return values


def merge(below: Mapping[str, object], above: Mapping[str, object]) -> dict[str, object]:
    """`above` laid over `below`, table by table."""
    out = dict(below)
    for key, value in above.items():
        old = out.get(key)
        out[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return out


def _in_words(cls: type[BaseModel], error: ValidationError, where: str) -> UserError:
    lines = []
    for fault in error.errors():
        name = ".".join(str(part) for part in fault["loc"])
        if fault["type"] == "extra_forbidden":
            close = difflib.get_close_matches(name.split(".")[-1], field_names(cls), n=1)
            lines.append(f"{name}: no such setting" + (f", did you mean {close[0]}?" if close else ""))
        elif fault["type"] == "missing":
            lines.append(f"{name}: required, but not given")
        else:
            given = "" if not name else f" (given: {fault['input']!r:.80})"
            lines.append(f"{name}: {fault['msg'].removeprefix('Value error, ')}{given}".removeprefix(": "))
    return UserError(f"{where}: " + "; ".join(lines), remedy="--help lists every setting of a verb")


def field_names(cls: type[BaseModel]) -> list[str]:
    """Names of all fields of a spec and of the specs inside it."""
    names: list[str] = []
    for name, info in cls.model_fields.items():
        names.append(name)
        names += [n for inner in inner_specs(info.annotation) for n in field_names(inner)]
    return names


def inner_specs(annotation: object) -> list[type[BaseModel]]:
    """The spec classes that an annotation mentions, alone or in a union."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [spec for part in get_args(annotation) for spec in inner_specs(part)]
