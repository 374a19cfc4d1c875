"""Hostile templates: none escapes, none hangs or fills memory, and the next conversation is rendered."""

import os
import time
from pathlib import Path

import jinja2
import pytest

from garage.core.errors import UserError
from garage.core.worker import Worker
from garage.tokens import sandbox
from garage.tokens.chat import Chat

ESCAPES = [
    "{{ ''.__class__ }}", "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ ''['__class__'] }}", "{{ ''|attr('__class__') }}",
    "{{ raise_exception.__globals__ }}", "{{ strftime_now.__globals__['sys'] }}", "{{ namespace.__init__.__globals__ }}",
    "{{ dict.__base__ }}", "{{ cycler.__init__.__globals__.os }}", "{{ lipsum.__globals__ }}", "{{ self.__init__.__globals__ }}",
    "{{ messages.__class__ }}", "{{ '{0.__class__}'.format(1) }}", "{{ ''.format.__self__.__class__ }}", "{{ messages.append(1) }}",
    "{{ messages[0].update({}) }}", "{% set n = namespace(_a=1) %}{{ n._a }}", "{% set n = namespace() %}{% set n.__class__ = 1 %}",
    "{{ loop.__class__ }}", "{{ (messages|map(attribute='__class__')|list)[0].mro }}", "{{ ''.join.__func__ }}",
    "{% include '/etc/passwd' %}", "{% import 'os' as os %}", "{% for x in messages %}{{ loop._iterable.__class__.mro() }}{% endfor %}",
    "{{ config.items.__globals__ }}", "{{ joiner('').__init__ }}",
]
BOMBS = [
    "{{ range(10**9)|list }}", "{{ range(1000000000)|list }}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "{{ 9**(9**9) }}", "{{ 'a'*2000000000 }}",
    "{{ '%1000000000d'|format(1) }}", "{{ '{:>1000000000}'.format(1) }}", "{{ '%1000000000d' % 1 }}", "{{ 'a'.center(1500000000) }}",
    "{% set n = namespace(x='a') %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "{% set n = namespace(x=[1]) %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "{% set n = namespace(x=3) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
    "{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}", "{{ lipsum(n=100000) }}", "{{ ('a '*5000000)|wordwrap(1) }}",
    "{% for a in range(99999) %}{{ 'aaaaaaaaaaaaaaaaaaaa' }}{% endfor %}", "{{ 'a\n'*99999|int|string|indent(1000000) }}",
    "{{ " + "(" * 9999 + "1" + ")" * 9999 + " }}",
]
VALUES = {"messages": [{"role": "user", "content": "hello"}], "bos_token": "<s>"}


def jailed(template):
    return Worker(Path(sandbox.__file__), first={"template": template}, seconds=2.0)


def outcome(template):
    """What a hostile template yields: its text, or None for a refusal."""
    try:
        return jailed(template).ask({"values": VALUES}).get("text")
    except TimeoutError:
        return None


@pytest.mark.parametrize("template", ESCAPES)
def test_no_escape(template):
    assert not any(word in (outcome(template) or "") for word in ("<class", "<function", "<built-in", "<module", "root:"))


def test_an_open_environment_is_noticed():
    """Broken twin: without the sandbox the same templates do escape."""
    escaped = sum("<" in _plain_jinja(template) for template in ESCAPES)
    assert escaped > 10


def _plain_jinja(template):
    try:
        return jinja2.Environment().from_string(template).render(**VALUES, raise_exception=print)
    except (jinja2.TemplateError, KeyError, TypeError):
        return ""


@pytest.mark.parametrize("template", BOMBS)
def test_no_bomb(template):
    begin = time.monotonic()
    got = outcome(template)
    assert got is None or len(got) <= 1_100_000
    assert time.monotonic() - begin < 20


def test_a_killed_process_is_replaced():
    """The same template hangs for one conversation and answers the next; the limit on time holds."""
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    worker = jailed("{% if messages[0].content == 'hang' %}" + loops + "{% endif %}fine")
    assert worker.ask({"values": VALUES}) == {"text": "fine"}
    first, begin = worker.pid, time.monotonic()
    with pytest.raises(TimeoutError, match="within 2 s"):
        worker.ask({"values": {"messages": [{"role": "user", "content": "hang"}]}})
    assert 1.5 < time.monotonic() - begin < 6 and worker.pid is None
    assert worker.ask({"values": VALUES}) == {"text": "fine"} and worker.pid != first
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)


def test_a_chat_says_why_a_template_was_stopped(tokenizers, tmp_path):
    tokenizers["chatml"].save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ 'a' * 2000000000 }}")
    with pytest.raises(UserError, match="refuses this conversation"):
        Chat.load(tmp_path, tokenizers["chatml"])


def test_the_process_sees_no_environment(monkeypatch):
    monkeypatch.setenv("GARAGE_SECRET", "hush")
    worker = jailed("x")
    worker.ask({"values": VALUES})
    assert b"hush" not in Path(f"/proc/{worker.pid}/environ").read_bytes()


def test_a_fork_gets_its_own_process():
    worker = jailed("{{ messages[0].content }}")
    worker.ask({"values": VALUES})
    child = os.fork()
    if child == 0:
        os._exit(0 if worker.pid is None and worker.ask({"values": VALUES}) == {"text": "hello"} else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert worker.ask({"values": VALUES}) == {"text": "hello"}
