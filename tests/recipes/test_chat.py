"""Conversations: through a pseudo-terminal as a person has them, and by pipe."""

import json
import os
import pty
import signal
import subprocess
import sys
import time

import pytest


def piped(fake, *lines, options=(), **env):
    """What `garage chat` writes to stdout and stderr when these lines are piped in."""
    words = [sys.executable, "-m", "garage", "chat", fake if isinstance(fake, str) else fake.model, *map(str, options)]
    done = subprocess.run(words, input="\n".join(lines) + "\n", capture_output=True, text=True, timeout=120, env=os.environ | env)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


class Terminal:
    """`garage chat` on a pseudo-terminal."""

    def __init__(self, fake, *options, **env):
        self.master, slave = pty.openpty()
        words = [sys.executable, "-m", "garage", "chat", fake.model, *options]
        self.process = subprocess.Popen(words, stdin=slave, stdout=slave, stderr=slave, env=os.environ | {"TERM": "dumb"} | env,
                                        start_new_session=True)  # fmt: skip
        os.close(slave)
        self.seen = ""

    def type(self, text):
        os.write(self.master, text.encode())

    def wait(self, text, seconds=30):
        """Everything up to `text`, taken from what was not waited for yet."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < end, f"{text!r} did not come, but {self.seen!r}"
            try:
                self.seen += os.read(self.master, 4096).decode(errors="replace")
            except OSError:
                raise AssertionError(f"{text!r} did not come before the end, but {self.seen!r}") from None
        before, _, self.seen = self.seen.partition(text)
        return before

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.master)


@pytest.fixture
def terminal(fake, tmp_path):
    started = []

    def start(*options, **env):
        started.append(Terminal(fake, *options, GARAGE_HOME=str(tmp_path / "home"), **env))
        started[-1].wait("> ")
        return started[-1]

    yield start
    for one in started:
        one.close()


def test_piped_lines_are_turns_and_the_conversation_is_remembered(fake, tmp_path):
    saved = tmp_path / "talk.jsonl"
    out, err = piped(
        fake, "hello", "two\\", "lines", "/temperature 0.2", "/top_p 7", "/max_tokens none", "/adapter code", "think of it", "/stats",
        f"/save {saved}", "/nonsense", options=("--system", "Be brief."),
    )  # fmt: skip
    assert out == "you said hello \nyou said two lines \nyou said think of it \n", "reasoning is not for a pipe"
    first, second, third = fake.bodies
    assert second["messages"] == [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "you said hello "}, {"role": "user", "content": "two\nlines"},
    ]  # fmt: skip
    assert (first["temperature"], first["max_tokens"], first["model"]) == (0.7, 512, "echo")
    assert (third["temperature"], third["model"]) == (0.2, "code")
    assert "max_tokens" not in third and "top_p" not in third and "/top_p: top_p" in err and "/retry" in err
    assert "6 tokens, the first after" in err and "context 9 tokens" in err and "> " not in out
    row = json.loads(saved.read_text())
    assert [turn["role"] for turn in row["messages"]] == ["system", *["user", "assistant"] * 3]
    assert row["messages"][-1]["reasoning"] == "hmm"
    piped(fake, "/retry", "more", options=("--load", saved))
    again, more = fake.bodies[3:]
    assert again["messages"] == row["messages"][:-1] and len(more["messages"]) == 8


def test_what_fails_takes_the_message_back_and_the_oldest_turns_go_when_it_is_full(fake):
    fake.plan, fake.most_turns = {"bad": [(500, {})]}, 3
    out, err = piped(fake, "one", "bad", "two", "three", "/reset", "/retry")
    assert out.splitlines() == ["you said one ", "", "you said two ", "you said three "]
    assert "no: 500" in err and err.count("the context is full: the 2 oldest turns are dropped") == 1 and "no message to answer" in err
    assert [turn["content"] for turn in fake.bodies[-1]["messages"]] == ["two", "you said two ", "three"]


def test_a_context_of_our_own_is_kept_by_counting(tmp_path):
    """Nano in 96 tokens: old turns go, and no answer is refused."""
    options = ("--engine.max_model_len", "96", "--max_tokens", "24", "--temperature", "0")
    out, err = piped("nano", *["What is the colour of the sky today?"] * 4, "/stats", "/adapter code", options=options)
    assert len(out.splitlines()) >= 4 and "error" not in err.replace("error: there is no adapter 'code'", "")
    assert "oldest turns are dropped" in err and "of 96 tokens" in err and "there is no adapter 'code'" in err


def test_on_a_terminal_an_answer_streams_stops_and_the_talk_goes_on(fake, terminal, tmp_path):
    fake.seconds = 0.15
    talk = terminal()
    talk.type("think of a very long list of words\n")
    assert "\x1b[2mhmm\x1b[0m" in talk.wait("you said")
    talk.wait("think")
    os.killpg(talk.process.pid, signal.SIGINT)
    talk.wait("(stopped)")
    talk.wait("> ")
    fake.seconds = 0.0
    talk.type("again\n")
    talk.wait("you said again")
    said = fake.bodies[-1]["messages"][1]["content"]
    assert said.startswith("you said think") and "words" not in said
    talk.wait("> ")
    os.killpg(talk.process.pid, signal.SIGINT)
    talk.wait("> ")
    talk.type("\x04")
    assert talk.process.wait(30) == 0
    assert "again" in (tmp_path / "home" / "chat_history").read_text()


def test_no_colour_where_none_is_wanted(terminal):
    talk = terminal(NO_COLOR="1")
    talk.type("think\n")
    shown = talk.wait("you said think")
    assert "hmm" in shown and "\x1b[2m" not in shown
    talk.wait("> ")
    os.kill(talk.process.pid, signal.SIGTERM)
    assert talk.process.wait(30) == -signal.SIGTERM
