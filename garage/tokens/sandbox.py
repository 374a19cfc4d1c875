"""The environment chat templates run in, and the program of the process that runs foreign ones.

What: Jinja as transformers sets it up: immutable sandbox, `trim_blocks`, `lstrip_blocks`, loop controls, `{% generation %}`, `tojson`
that keeps Unicode, `raise_exception`, `strftime_now`; no name that starts with `_`. As a script it answers JSON lines (`core.worker`).
Why so: a chat template is untrusted code. The sandbox stops escapes but neither endless loops nor memory bombs, so a foreign template
is compiled and rendered only in a process that limits itself and that is killed. It imports nothing of ours, for a quick start.
Limits: 256 MB address space and 3 s CPU per answer where the system enforces them; output of 1 MB beyond four times the input.
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

MEMORY_BYTES, CPU_SECONDS, OUTPUT_CHARS = 256 * 1024 * 1024, 3, 1_000_000
OPEN, CLOSE = "\ufdd0", "\ufdd1"  # noncharacters that bracket a generation block


class Program:
    """One template: ask {"template"} for what its source holds, then {"values"} for a text with its generation blocks in brackets."""

    def ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        try:
            return {"text": self._render(question["values"])} if "values" in question else self._compile(question["template"])
        except Exception as error:  # the edge of a process: whatever a hostile template raises becomes an answer
            return {"error": f"{type(error).__name__}: {error}"[:500]}

    def _compile(self, text: str) -> dict[str, Any]:
        environment = make_environment()
        tree = environment.parse(text)
        stored = [*(n.attr for n in tree.find_all(nodes.NSRef)), *(n.key for n in tree.find_all(nodes.Keyword))]
        if tree.find(nodes.Pow) or any(name.startswith("_") for name in stored):
            raise SecurityError("the operator ** and names that start with _ are not allowed in a chat template")
        self._template = environment.from_string(text)
        constants = {n.value for n in tree.find_all(nodes.Const) if isinstance(n.value, str)}
        names = {*(n.name for n in tree.find_all(nodes.Name)), *(n.attr for n in tree.find_all(nodes.Getattr))}
        return {"constants": sorted(constants), "names": sorted(constants | names)}

    def _render(self, values: Mapping[str, Any]) -> str:
        pieces, left = [], OUTPUT_CHARS + 4 * len(json.dumps(values))
        for piece in self._template.generate(**values):
            pieces.append(piece)
            left -= len(piece)
            if left < 0:
                raise SecurityError("the chat template writes far more than it was given")
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


def make_environment() -> Environment:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, "jinja2.ext.loopcontrols"])
    for name in ("lipsum", "cycler", "joiner"):
        del environment.globals[name]
    for name in ("center", "format", "wordwrap", "urlize", "pprint", "xmlattr"):
        del environment.filters[name]
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _raise, "strftime_now": lambda form: datetime.now().strftime(form)}
    return environment


def _raise(message: str) -> None:
    raise TemplateError(message)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    program = Program()
    print('{"ready": true}', flush=True)
    for line in sys.stdin:
        used = resource.getrusage(resource.RUSAGE_SELF)
        resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime) + CPU_SECONDS, resource.RLIM_INFINITY))
        print(json.dumps(program.ask(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
