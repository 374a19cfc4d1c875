"""Writes docs/reference.md: every verb, every option with its default and meaning, straight from the specs.

A test fails when the file is out of date, so the reference cannot drift from the code. Run by `make docs`.
"""

import importlib
from pathlib import Path

from garage.cli import VERBS
from garage.specs.base import Spec
from garage.specs.options import all_fields, choices, shown

HEAD = """# Reference

Every verb and every option, generated from the specs by `make docs`. Every verb also takes `--dry-run` (print the resolved spec and the
plan, then stop), `--json` (one JSON object as the last line of stdout) and `--help`."""


def section(verb: str, cls: type[Spec], about: str) -> str:
    """One verb: what it does, its bare arguments, and a table of its options."""
    bare = " ".join(name.upper() for name in cls.positional)
    lines = [f"## `garage {verb}`", "", f"{about[0].upper()}{about[1:]}. {(cls.__doc__ or '').strip()}", ""]
    lines.append(f"`garage {verb} [SPEC.toml] {bare} [--option VALUE ...]`".replace("  ", " "))
    lines += ["", "| option | default | meaning |", "|---|---|---|"]
    for name, info in all_fields(cls):
        default = "required" if info.is_required() else f"`{shown(info.default)}`"
        words = ", ".join(f"`{word}`" for word in choices(cls, name.split(".")))
        lines.append(f"| `--{name}` | {default} | {info.description}{f' ({words})' if words else ''} |")
    return "\n".join(lines)


def reference() -> str:
    """The whole page."""
    parts = [HEAD]
    for verb, entry in VERBS.items():
        module, _, name = entry.spec.partition(":")
        parts.append(section(verb, getattr(importlib.import_module(f"garage.{module}"), name), entry.about))
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("reference.md").write_text(reference(), encoding="utf-8")
