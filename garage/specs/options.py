"""From an argument list to the plain values of a spec, and from a spec to its help text.

`garage sft nano --data rows.jsonl --adapter.rank 32 --fit.max_steps 100` becomes
`{"model": "nano", "data": ["rows.jsonl"], "adapter": {"rank": "32"}, "fit": {"max_steps": "100"}}`; pydantic turns the texts into
numbers. A first bare argument that ends in .toml, or is called spec.json, is the spec file. A list is written `a,b` or by repeating its
option. The word `none` is no value, or an empty list, unless it is one of the option's choices. A flag without a value is true.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from garage.core.errors import UserError
from garage.specs.base import Spec, inner_specs


@dataclass
class Arguments:
    """What an argument list says: where the spec file is, the values beside it, and the switches every verb has."""

    spec_file: Path | None = None
    values: dict[str, object] = field(default_factory=dict)
    json: bool = False
    dry_run: bool = False
    help: bool = False


def read_arguments(cls: type[Spec], argv: Sequence[str]) -> Arguments:
    """Sort `argv` into the fields of `cls`.

    Raises:
        UserError: an option that `cls` does not have, an option without its value, or one bare argument too many.
    """
    out, rest = Arguments(), list(argv)
    bare: list[str] = []
    while rest:
        word = rest.pop(0)
        if word in ("--json", "--dry-run", "--help", "-h"):
            setattr(out, word.lstrip("-").replace("-", "_").replace("h", "help", word == "-h"), True)
        elif word.startswith("--"):
            _take_option(cls, word[2:], rest, out.values)
        elif not bare and out.spec_file is None and (word.endswith(".toml") or Path(word).name == "spec.json"):
            out.spec_file = Path(word)
        else:
            bare.append(word)
    _take_bare(cls, bare, out.values)
    return out


def _take_option(cls: type[Spec], word: str, rest: list[str], values: dict[str, object]) -> None:
    name, has_value, value = word.partition("=")
    path = name.replace("-", "_").split(".")
    info = find_field(cls, path)
    if info is None:
        close = difflib.get_close_matches(".".join(path), [n for n, _ in all_fields(cls)], n=1, cutoff=0.5)
        hint = f"did you mean --{close[0]}?" if close else "--help lists every option"
        raise UserError(f"there is no option --{name} here", remedy=hint)
    if not has_value:
        value = _next_value(name, info, rest)
    _put(values, _to_field(cls, path), value, many=_is_tuple(info), names_none="none" in get_args(info.annotation))


def _next_value(name: str, info: FieldInfo, rest: list[str]) -> str:
    is_flag = info.annotation is bool
    if is_flag and (not rest or rest[0].lower() not in ("true", "false", "yes", "no", "1", "0")):
        return "true"
    if not rest:
        raise UserError(f"option --{name} needs a value", remedy=f"write --{name} VALUE")
    return rest.pop(0)


def _put(values: dict[str, object], path: Sequence[str], value: str, *, many: bool, names_none: bool) -> None:
    for part in path[:-1]:
        inner = values.setdefault(part, {})
        assert isinstance(inner, dict), f"{part} was given both as a value and as a table"
        values = inner
    is_none = value.lower() == "none"
    if many:
        old = values.get(path[-1], [])
        values[path[-1]] = [*old, *([] if is_none else value.split(","))]  # type: ignore[misc]
    else:
        values[path[-1]] = None if is_none and not names_none else value


def _take_bare(cls: type[Spec], bare: list[str], values: dict[str, object]) -> None:
    names = list(cls.positional)
    while bare and names:
        name = names.pop(0)
        if _is_tuple(cls.model_fields[name]):
            values[name], bare = bare, []
        else:
            values[name] = bare.pop(0)
    if bare:
        raise UserError(f"unexpected argument {bare[0]!r}", remedy="options are written --name VALUE; --help lists them")


def find_field(cls: type[BaseModel], path: Sequence[str]) -> FieldInfo | None:
    """The field a dotted path leads to, through tables and unions of tables; None if it leads nowhere."""
    info = cls.model_fields.get(path[0])
    if info is None or len(path) == 1 or _is_mapping(info):
        return info
    return next((found for spec in inner_specs(info.annotation) if (found := find_field(spec, path[1:]))), None)


def _to_field(cls: type[BaseModel], path: Sequence[str]) -> list[str]:
    """The path with everything behind a field that holds names as one part: module names have dots."""
    for end in range(1, len(path)):
        if (info := find_field(cls, path[:end])) is not None and _is_mapping(info):
            return [*path[:end], ".".join(path[end:])]
    return list(path)


def all_fields(cls: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every settable field with its dotted name, tables opened up; a name that several variants share comes once."""
    seen = set()
    for name, info in cls.model_fields.items():
        inner = inner_specs(info.annotation)
        below = [pair for spec in inner for pair in all_fields(spec, f"{prefix}{name}.")] if inner else [(prefix + name, info)]
        for dotted, field_info in below:
            if dotted not in seen:
                seen.add(dotted)
                yield dotted, field_info


def help_text(verb: str, cls: type[Spec]) -> str:
    """Usage, what the verb does, and every option with its default and meaning."""
    bare = " ".join(f"{n.upper()}..." if _is_tuple(cls.model_fields[n]) else n.upper() for n in cls.positional)
    usage = f"usage: garage {verb} [SPEC.toml] {bare} [--option VALUE ...]".replace("  ", " ")
    lines = [usage, "", (cls.__doc__ or "").strip(), "", "options:"]
    for name, info in sorted(all_fields(cls), key=lambda pair: (not pair[1].is_required(), "." in pair[0])):
        default = "required" if info.is_required() else shown(info.default)
        words = " | ".join(choices(cls, name.split(".")))
        lines.append(f"  --{name:<32} {info.description}{f' ({words})' if words else ''} [{default}]")
    lines.append(f"  --{'dry-run':<32} print the resolved spec and the plan, then stop")
    lines.append(f"  --{'json':<32} print one JSON object as the last line of stdout")
    return "\n".join(lines)


def to_toml(values: Mapping[str, object], path: str = "") -> str:
    """Plain values as TOML, tables after values; what is None is left out, for TOML has no such word."""
    given = [(_toml_key(key), value) for key, value in values.items() if value is not None and not isinstance(value, Mapping)]
    tables = [(f"{path}{key}", value) for key, value in values.items() if isinstance(value, Mapping)]
    plain = [f"{key} = {_toml_value(value)}" for key, value in given]
    return "\n".join([*plain, *(f"\n[{name}]\n{to_toml(value, name + '.')}" for name, value in tables)])


def _toml_key(key: str) -> str:
    return key if key.replace("_", "").replace("-", "").isalnum() and key.isascii() else _toml_value(key)


def _toml_value(value: object) -> str:
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return str(value)
    return '"' + str(value).replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def shown(default: object) -> str:
    """A default as a person would type it."""
    if isinstance(default, tuple):
        return ",".join(map(str, default))
    return {None: "none", "": '""'}.get(default, str(default)) if default is None or isinstance(default, str) else str(default)


def choices(cls: type[BaseModel], path: Sequence[str]) -> list[str]:
    """The words a field accepts, over all variants of the tables above it."""
    info = cls.model_fields.get(path[0])
    if info is None:
        return []
    if len(path) > 1:
        return list(dict.fromkeys(word for spec in inner_specs(info.annotation) for word in choices(spec, path[1:])))
    return [str(choice) for choice in get_args(info.annotation)] if get_origin(info.annotation) is Literal else []


def _is_mapping(info: FieldInfo) -> bool:
    return get_origin(info.annotation) is Mapping


def _is_tuple(info: FieldInfo) -> bool:
    return get_origin(info.annotation) is tuple
