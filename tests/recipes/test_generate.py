"""Rows in, answers out: all of them, once, in order, whatever happens in between."""

import json
import re
import signal
import subprocess
import sys
import time
from collections import Counter

from garage.cli import main


def write(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def run(capsys, *words, code=0):
    assert main(["generate", *map(str, words), "--json"]) == code
    said = capsys.readouterr()
    return (json.loads(said.out.splitlines()[-1]) if code == 0 else {}), said.err


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def said(line):
    return line["messages"][-1]["content"]


def test_every_kind_of_row_has_its_line_in_order_and_damaged_ones_say_why(tmp_path, capsys, fake):
    batch = {"custom_id": "b", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [{"role": "user", "content": "q5"}]}}
    rows = [
        {"prompt": "q1"}, "not json", "", {"question": "q3", "answer": "four", "topic": "sums"},
        {"messages": [{"role": "user", "content": "q4"}]}, batch,
        batch, {"foo": 1}, {**batch, "custom_id": "c", "url": "/v1/load_lora_adapter"}, {"text": "q7"},
        {"qa_pairs": [{"question": "q8", "answer": "a"}, {"question": "q9", "answer": "b"}]},
    ]  # fmt: skip
    out = tmp_path / "out.jsonl"
    words = ("--input", write(tmp_path / "in.jsonl", rows), "--out", out, "--temperature", "0.5", "--system", "S")
    found, err = run(capsys, fake.model, *words)
    got = lines(out)
    assert (found["rows"], found["failed"], found["asked"], len(got)) == (11, 4, 11, 11)
    assert found["tokens"] == 2 * 7 and found["prompt_tokens"] == 3 * 7
    assert said(got[0]) == "<q1>" and said(got[3]) == "<q4>" and [said(line) for line in got[9:]] == ["<q8>", "<q9>"]
    assert (got[2]["reference"], got[2]["topic"], said(got[2])) == ("four", "sums", "<q3>")
    assert got[4]["response"]["body"]["choices"][0]["message"]["content"] == "<q5>"
    assert got[4]["custom_id"] == "b" and got[4]["error"] is None and "occurs twice" in got[5]["error"]["message"]
    assert "hold no prompt" in got[6]["error"] and "load_lora" in got[7]["error"]["message"]
    assert got[8]["prompt"] == "q7" and got[8]["completion"] == "<q7>"
    assert all(f"line {number}: " in err for number in (2, 7, 8, 9))
    assert fake.asked.total() == 7 and all(body["temperature"] == 0.5 and body["model"] == "echo" for body in fake.bodies)
    assert {body["messages"][0]["content"] for body in fake.bodies if "messages" in body} == {"S"}


def test_a_second_run_asks_only_what_failed_and_other_settings_are_refused(tmp_path, capsys, fake):
    fake.plan = {"q2": [(400, {})], "q4": [(429, {"retry-after": "0"}), (500, {"retry-after": "0"})]}
    rows, out = write(tmp_path / "in.jsonl", [{"prompt": f"q{i}"} for i in range(6)]), tmp_path / "out.jsonl"
    words = (fake.model, "--input", rows, "--out", out)
    assert run(capsys, *words)[0]["failed"] == 1 and lines(out)[2]["error"] == "no: 400"
    assert fake.asked == {**dict.fromkeys(["q0", "q1", "q2", "q3", "q5"], 1), "q4": 3}
    first = [said(line) for line in lines(out) if "error" not in line]
    found, _ = run(capsys, *words)
    assert (found["asked"], found["failed"], fake.asked["q2"], fake.asked["q3"]) == (1, 0, 2, 1)
    assert len(first) == 5 and [said(line) for line in lines(out)] == [f"<q{i}>" for i in range(6)]
    before = out.read_bytes()
    assert run(capsys, *words)[0]["asked"] == 0 and out.read_bytes() == before
    assert "given with other settings" in run(capsys, *words, "--temperature", "1", code=2)[1] and out.read_bytes() == before
    write(rows, [*({"prompt": f"q{i}"} for i in range(6)), {"prompt": "q6"}])
    assert run(capsys, *words)[0]["asked"] == 1 and said(lines(out)[6]) == "<q6>"
    fake.plan = {"q7": [(401, {})]}
    write(rows, [*({"prompt": f"q{i}"} for i in range(8))])
    assert "refuses the key" in run(capsys, *words, code=2)[1] and len(lines(out)) == 7


def test_rows_have_seeds_of_their_own_that_order_does_not_change(tmp_path, capsys, fake):
    rows, out = write(tmp_path / "in.jsonl", [{"prompt": "same"}] * 20), tmp_path / "out.jsonl"
    run(capsys, fake.model, "--input", rows, "--out", out, "--n", "3")
    seeds = sorted(body["seed"] for body in fake.bodies)
    assert len(set(seeds)) == 20 and len(lines(out)[0]["choices"]) == 3
    out.unlink()
    run(capsys, fake.model, "--input", rows, "--out", out, "--n", "3", "--concurrency", "1")
    assert sorted(body["seed"] for body in fake.bodies[20:]) == seeds


def test_killed_again_and_again_nothing_is_lost_or_twice(tmp_path, capsys, fake):
    """kill -9 while rows are under way, one of them with half a line left behind; what has a line is never asked again."""
    fake.seconds, total = 0.02, 300
    rows, out = write(tmp_path / "in.jsonl", [{"prompt": f"q{i}"} for i in range(total)]), tmp_path / "out.jsonl"
    words = [fake.model, "--input", rows, "--out", out, "--concurrency", "4"]
    kept, landed = Counter(), 0
    for attempt in range(3):
        process = subprocess.Popen([sys.executable, "-m", "garage", "generate", *map(str, words)], stderr=subprocess.DEVNULL)
        goal, end = 60 * (attempt + 1), time.monotonic() + 60
        while process.poll() is None and time.monotonic() < end and (out.read_bytes().count(b"\n") if out.exists() else 0) < goal:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        landed += process.wait() == -signal.SIGKILL
        time.sleep(0.1)
        assert all(fake.asked[prompt] == count for prompt, count in kept.items()), "asked again though it had a line"
        kept = Counter({said(line)[1:-1]: fake.asked[said(line)[1:-1]] for line in lines(out)})
        if attempt == 1:
            with open(out, "ab") as file:
                file.write(b'{"messages": [{"role": "us')
    assert landed == 3 and len(kept) >= 180
    found, _ = run(capsys, *words)
    assert found["asked"] == total - len(kept) and fake.asked.total() <= total + 3 * 4
    assert [said(line) for line in lines(out)] == [f"<q{i}>" for i in range(total)]
    assert [path.name for path in tmp_path.iterdir() if path.name not in ("in.jsonl", "out.jsonl")] == []


def test_two_at_once_are_refused_and_so_is_a_file_that_is_something_else(tmp_path, capsys, fake):
    import fcntl

    rows, out = write(tmp_path / "in.jsonl", [{"prompt": "q"}]), tmp_path / "out.jsonl"
    with open(out, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "another process" in run(capsys, fake.model, "--input", rows, "--out", out, code=2)[1]
    out.write_text("my notes\n")
    assert "not a file of answers" in run(capsys, fake.model, "--input", rows, "--out", out, code=2)[1] and out.read_text() == "my notes\n"
    assert "no file" in run(capsys, fake.model, "--input", tmp_path / "nothing.jsonl", "--out", tmp_path / "o", code=2)[1]
    words = ("--input", rows, "--out", tmp_path / "o", "--regex", "a", "--choice", "b")
    assert "exclude each other" in run(capsys, fake.model, *words, code=2)[1]


def test_a_model_of_this_disk_answers_the_same_in_any_order(tmp_path, capsys):
    """Seeded sampling through the real engine, many at once and one at a time; a row that cannot fit is a line that says so."""
    rows = write(tmp_path / "in.jsonl", [*({"prompt": f"What is {i} plus {i}?"} for i in range(9)), {"prompt": "x" * 9000}])
    words = ("nano", "--input", rows, "--max_tokens", "12", "--temperature", "1", "--engine.dtype", "float32")
    found, err = run(capsys, *words, "--out", tmp_path / "many.jsonl")
    assert found["failed"] == 1 and re.search(r"line 10: \d+ prompt tokens", err) and found["tokens"] > 9
    run(capsys, *words, "--out", tmp_path / "one.jsonl", "--engine.max_num_seqs", "1", "--concurrency", "1")
    many, one = (lines(tmp_path / name) for name in ("many.jsonl", "one.jsonl"))
    assert [said(line) for line in many[:9]] == [said(line) for line in one[:9]] and len({said(line) for line in many[:9]}) > 3
