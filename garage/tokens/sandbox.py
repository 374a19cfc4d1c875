"""The environment chat templates run in, and the program of the process that runs foreign ones.

What: Jinja as transformers sets it up: immutable sandbox, `trim_blocks`, `lstrip_blocks`, loop controls, the `{% generation %}` tag, `tojson`
that keeps Unicode, `raise_exception`, `strftime_now`; no name that starts with `_`. Run as a script it answers one JSON line per line.
Why so: a chat template is untrusted code. The sandbox stops escapes but neither endless loops nor memory bombs, so a foreign template
is compiled and rendered only in a process that limits itself and that `jail` kills. This file imports nothing of ours, for a quick start.
Limits: 256 MB address space and 3 s CPU per answer where the system enforces them; `**` and the generators of text are refused outright.
"""

import json
import resource
import sys
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any

from jinja2 import Environment, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

MEMORY_BYTES, CPU_SECONDS, OUTPUT_CHARS = 256 * 1024 * 1024, 3, 1_000_000
OPEN, CLOSE = "\ufdd0", "\ufdd1"  # noncharacters that bracket a generation block; the caller keeps them out of every message


class Program:
    """A compiled template. `variables` are the names it reads, `constants` the texts it compares or writes, `fields` the names it looks up."""

    def __init__(self, text: str) -> None:
        environment = make_environment()
        tree = environment.parse(text)
        if tree.find(nodes.Pow):
            raise SecurityError("the operator ** is not allowed in a chat template")
        self.facts: dict[str, list[str]] = {
            "constants": sorted({n.value for n in tree.find_all(nodes.Const) if isinstance(n.value, str)}),
            "names": sorted({n.name for n in tree.find_all(nodes.Name)} | {n.attr for n in tree.find_all(nodes.Getattr)}
                            | {n.value for n in tree.find_all(nodes.Const) if isinstance(n.value, str)}),
        }
        self._template = environment.from_string(text)

    def render(self, values: Mapping[str, Any], limit: int) -> str:
        """The text, with OPEN and CLOSE around generation blocks; at most `limit` characters."""
        pieces, size = [], 0
        for piece in self._template.generate(**values):
            pieces.append(piece)
            size += len(piece)
            if size > limit:
                raise SecurityError(f"the chat template writes more than {limit:,} characters")
        return "".join(pieces)


class GenerationTag(Extension):
    """`{% generation %} ... {% endgeneration %}`: what the model is to learn."""

    tags = {"generation"}  # noqa: RUF012 (a class attribute by Jinja's contract)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_bracket"), [], [], body).set_lineno(line)

    def _bracket(self, caller: Callable[[], str]) -> str:
        return OPEN + caller() + CLOSE


class SafeNamespace(Namespace):
    """A namespace without names that start with `_`."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        values = dict(*args[1:], **kwargs)
        for name in values:
            _refuse_private(name)
        Namespace.__init__(args[0], values)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


def make_environment() -> Environment:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, "jinja2.ext.loopcontrols"])
    for name in ("lipsum", "cycler", "joiner"):
        del environment.globals[name]
    for name in ("center", "format", "wordwrap", "urlize", "pprint", "xmlattr", "filesizeformat"):
        del environment.filters[name]
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _raise, "strftime_now": _now, "namespace": SafeNamespace, "dict": _dict}
    return environment


def _refuse_private(name: object) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"the name {name!r} is not allowed in a chat template")


def _raise(message: str) -> None:
    raise TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    return dict(*args, **kwargs)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: tuple[str, str] | None = None,
            sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def main() -> None:
    """Answer "ready", then {"facts"} to a {"template"} line and {"text"} to each {"values", "limit"} line, or {"error"}."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    program: Program | None = None
    print('{"ready": true}', flush=True)
    for line in sys.stdin:
        used = resource.getrusage(resource.RUSAGE_SELF)
        resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + CPU_SECONDS, resource.RLIM_INFINITY))
        try:
            ask = json.loads(line)
            if program is None:
                program = Program(ask["template"])
                answer: dict[str, Any] = {"facts": program.facts}
            else:
                answer = {"text": program.render(ask["values"], ask["limit"])}
        except Exception as error:  # the edge of a process: whatever a hostile template raises becomes an answer
            answer = {"error": f"{type(error).__name__}: {error}"[:500]}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
