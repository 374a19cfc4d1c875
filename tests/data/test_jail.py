"""The jail: whatever a parser does costs its own file, and the next one is read."""

import gc
import socket
import time
from pathlib import Path

import pytest

from garage.data.jail import Jail, Limits

HOSTILE = Path(__file__).with_name("hostile.py")


@pytest.fixture
def ask(tmp_path):
    def asked(jail, order):
        path = tmp_path / "file"
        path.write_text(order)
        return jail.read(path)

    return asked


def alive(pid):
    return Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0]


def test_one_child_forks_for_file_after_file(ask, limits):
    jail = Jail(HOSTILE, limits)
    readers = {ask(jail, "pid").pages[0] for _ in range(3)}
    child = jail._worker.pid
    assert ask(jail, "hello").pages == ("hello", "True") and len(readers) == 3 and child == jail._worker.pid
    assert alive(child) and not any(map(alive, readers))
    del jail
    gc.collect()
    assert not alive(child), "the child ends with the jail"


def test_what_a_document_changes_in_its_reader_is_gone_for_the_next(tmp_path, limits):
    program = tmp_path / "program.py"
    program.write_text(
        "from garage.data.jail import Reply, serve\nseen = []\n"
        "def read(path):\n    seen.append(path.name)\n    return Reply(pages=tuple(seen))\nserve(read)\n"
    )
    jail = Jail(program, limits)
    assert [jail.read(tmp_path / name).pages for name in "abc"] == [("a",), ("b",), ("c",)]


@pytest.mark.parametrize(
    ("order", "says"),
    [
        ("die", "the process died"),
        ("raise", "corrupt"),
        ("hog", "more than 128 MB"),
        ("flood", "too large"),
        ("write", "File too large"),
        ("connect", "no network"),
    ],
)
def test_a_bad_file_costs_only_itself(ask, limits, order, says, tmp_path):
    jail = Jail(HOSTILE, Limits(60.0, 600 << 20) if order == "flood" else limits)
    assert says in ask(jail, order).error
    assert ask(jail, "next").pages[0] == "next"
    assert not (tmp_path / "written").exists() or (tmp_path / "written").stat().st_size == 0


@pytest.mark.parametrize("order", ["hang", "spin"])
def test_a_hang_is_ended_within_its_limit(ask, order):
    jail = Jail(HOSTILE, Limits(seconds=1.0, memory=128 << 20))
    (pid,) = ask(jail, "pid").pages
    start = time.monotonic()
    assert "no answer within 1 s" in ask(jail, order).error
    assert time.monotonic() - start < 3.0 and not alive(pid)
    assert ask(jail, "next").pages[0] == "next"


def test_it_is_the_memory_limit_that_stops_the_hog(ask, limits):
    assert ask(Jail(HOSTILE, Limits(seconds=60.0, memory=1 << 30)), "hog").pages == (str(600 << 20),)


def test_what_a_library_prints_is_no_answer(ask, limits):
    assert ask(Jail(HOSTILE, limits), "print").pages[0] == "print"


def test_the_child_knows_no_environment_of_ours(ask, limits, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    (names,) = ask(Jail(HOSTILE, limits), "environment").pages
    assert set(names.split(",")) <= {"PYTHONPATH", "PATH", "LC_CTYPE", "PYTHONUTF8"}


def test_not_even_a_raw_socket_reaches_us(ask, limits, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        (tmp_path / "port").write_text(str(server.getsockname()[1]))
        reply = ask(Jail(HOSTILE, limits), "raw connect")
        if reply.is_weak:
            pytest.skip("this kernel gives no network namespace; the jail says that it is weak")
        assert "unreachable" in reply.error
    with socket.create_server(("127.0.0.1", 0)) as server:  # the broken twin: outside the jail the same call connects
        socket.create_connection(server.getsockname(), timeout=5).close()


def test_a_program_that_does_not_start_is_said(tmp_path, limits):
    program = tmp_path / "broken.py"
    program.write_text("raise SystemExit(3)")
    assert "the process died" in Jail(program, limits).read(program).error
