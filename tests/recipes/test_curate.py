"""The tools on datasets of every kind: every row is either kept or rejected with a reason, and the old dataset stays as it was."""

import json

import pytest

from garage.core.artifact import hash_tree, read_manifest
from garage.core.errors import UserError
from garage.core.types import Completion, Message, Row
from garage.data.encode import write_dataset
from garage.recipes import curate as recipe
from garage.recipes import teachers
from garage.recipes.curate import curate, decontaminate, dedup
from garage.specs.curate import CurateSpec, DecontaminateSpec, DedupSpec
from garage.store.corpus import Chunk, Document, write_corpus
from garage.store.dataset import read_rows

DUCKS = ("Janet’s ducks lay 16 eggs per day. She eats three for breakfast every morning and bakes muffins for her friends every day with "
         "four. She sells the remainder at the farmers' market daily for $2 per fresh duck egg. How much in dollars does she make every "
         "day at the farmers' market?")  # fmt: skip
TEXT = "The bakery in Mill Street opens at 7:30 and sells 1,200 rolls a day. It was founded in 1871 by Ada Kern."


def row(id, question, answer, **meta):
    return Row(id, (Message("user", question), Message("assistant", answer)), meta=meta)


def artifact(place, **splits):
    write_dataset(place, splits, None)
    return str(place)


def rows_of(place, split):
    return list(read_rows(place, split))


def reasons(place):
    return {each.id: each.meta["rejected"] for each in rows_of(place, "rejected")}


def test_dedup_of_an_artifact_keeps_held_out_rows_and_all_that_goes(tmp_path, capsys):
    pytest.importorskip("rensa")
    train = [row("a", "Who?", "Ada."), row("b", "Where?", "Here."), row("c", "where? ", "here.", rating="8"), row("d", "When?", "Now.")]
    data = artifact(tmp_path / "old", train=train, test=[row("t", "who?", "Ada.")], rejected=[row("r", "q", "a", rejected="refusal: no")])
    before = hash_tree(tmp_path / "old")
    done = dedup(DedupSpec(data=data, out=tmp_path / "new"))
    assert (done.total, done.kept, done.rejected, done.retention, done.mean_rating) == (5, 3, {"copy": 2}, 0.6, None)
    assert [each.id for each in rows_of(tmp_path / "new", "train")] == ["c", "d"] and rows_of(tmp_path / "new", "test")[0].id == "t"
    assert reasons(tmp_path / "new") == {"r": "refusal: no", "a": "copy of t", "b": "copy of c"}
    manifest = read_manifest(tmp_path / "new", "dataset")
    assert manifest.parents == (read_manifest(tmp_path / "old").id,) and manifest.facts["rejected_rows"] == 3
    assert hash_tree(tmp_path / "old") == before
    assert "kept 3 of 5 rows (60.0%); rejected 2 copy" in capsys.readouterr().out


def test_decontaminate_drops_training_rows_only(tmp_path):
    asked = "Name the street, the year and the founder of the oldest bakery that still sells rolls in town."
    train = [row("a", DUCKS, "18"), row("b", DUCKS.replace("16", "26"), "38"), row("c", asked, "Mill Street"), row("d", "Why?", "So.")]
    data = artifact(tmp_path / "old", train=train, test=[row("t", DUCKS, "18")])
    exam = artifact(tmp_path / "exam", test=[row("x", asked.upper(), "1871")], train=[row("y", "Why?", "So.")])
    done = decontaminate(DecontaminateSpec(data=data, out=tmp_path / "new", against=(exam,)))
    assert reasons(tmp_path / "new") == {"a": "question in gsm8k-test", "b": "template in gsm8k-test", "c": "question in exam"}
    assert done.rejected == {"question in gsm8k-test": 1, "template in gsm8k-test": 1, "question in exam": 1} and done.kept == 2
    assert [each.id for each in rows_of(tmp_path / "new", "test")] == ["t"]


def corpus(place):
    chunks = [Chunk("c1", "d1", TEXT, 0, len(TEXT), 30, ("Opening hours",))]
    write_corpus(place, [(Document("d1", "a.md", "md", len(TEXT)), TEXT)], chunks, [], spec={})
    return place


CASES = [
    row("good", "When does the bakery open?", "It opens at 7:30.", chunk="c1", support="opens at 7:30"),
    row("number", "When does the bakery open?", "It opens at 8:30.", chunk="c1"),
    row("lost", "When does the bakery open?", "It opens at 7:30.", chunk="c9"),
    row("free", "What do we eat with soup?", "Bread, of course, and butter. Write to ada@mill.example."),
    row("refusal", "What do we eat with soup?", "I cannot say."),
]


def test_curate_without_a_judge(tmp_path, capsys):
    events = []
    data = artifact(tmp_path / "old", train=CASES)
    done = curate(CurateSpec(data=data, out=tmp_path / "new", corpus=corpus(tmp_path / "corpus")), events.append)
    found = reasons(tmp_path / "new")
    assert set(found) == {"number", "lost", "refusal"} and found["number"] == "ungrounded: the number 8 is not in the chunk"
    assert (done.total, done.kept, done.rejected) == (5, 2, {"ungrounded": 2, "refusal": 1}) and done.flagged == {"e-mail": 1}
    good, free = rows_of(tmp_path / "new", "train")
    assert good.meta["rating"] == "10" and free.meta["flags"] == "e-mail" and done.mean_rating == (10 + float(free.meta["rating"])) / 2
    assert any("2 rows are not checked" in str(event.get("message")) for event in events)
    assert "mean rating" in capsys.readouterr().out


def test_a_judge_is_opened_by_name_and_its_scores_decide(tmp_path, monkeypatch):
    class Judge:
        def generate(self, requests):
            return [Completion(request.id, self.reply(request), (), "stop", 0) for request in requests]

        def reply(self, request):
            data = json.loads(request.prompt[1].content.split("\n")[1])
            scores = {"accuracy": 3, "relevance": 2, "clarity": 2}
            return json.dumps({each["id"]: scores | {"usefulness": int(each["answer"][-2])} for each in data["rows"]})

    opened = []
    monkeypatch.setattr(teachers, "open_generator", lambda name, *, concurrency: opened.append((name, concurrency)) or Judge())
    rows = [row(str(n), f"What about roll {n}?", f"Roll {n % 4}.") for n in range(50)]
    data = artifact(tmp_path / "old", train=rows)
    done = curate(CurateSpec(data=data, out=tmp_path / "new", judge="http://h/v1#m", threshold=9, concurrency=2, batch=8))
    assert opened == [("http://h/v1#m", 2)] and done.rejected == {"rating": 26} and done.kept == 24
    assert all(float(each.meta["rating"]) >= 9 for each in rows_of(tmp_path / "new", "train"))
    assert done.mean_rating == pytest.approx(sum(7 + n % 4 for n in range(50)) / 50)


@pytest.mark.parametrize("verb", [dedup, decontaminate, curate])
def test_every_tool_reads_any_dataset_and_says_what_it_cannot(tmp_path, verb, capsys):
    pytest.importorskip("rensa")
    path, events = tmp_path / "rows.jsonl", []
    path.write_text("".join(json.dumps({"question": f"Question number {n}?", "answer": "Yes."}) + "\n" for n in range(7)) + "{broken\n")
    cls = {dedup: DedupSpec, decontaminate: DecontaminateSpec, curate: CurateSpec}[verb]
    done = verb(cls(data=str(path), out=tmp_path / "new"), events.append)
    assert done.total == 7 == len(rows_of(tmp_path / "new", "train")) + len(rows_of(tmp_path / "new", "rejected"))
    assert any("line 8" in str(event.get("message")) for event in events)
    assert capsys.readouterr().out.count("\n") == 1


def test_a_dataset_is_not_written_over_itself(tmp_path):
    data = artifact(tmp_path / "old", train=CASES)
    with pytest.raises(UserError, match="needs a new place"):
        DedupSpec.parse({"data": data, "out": data})


def test_with_notes_of_another_order_rows_would_go_wrongly(tmp_path):
    """The notes follow the splits; were they read in another order, the wrong rows would go, and this test would see it."""
    data = artifact(tmp_path / "old", train=[row("a", "q", "a"), row("b", "q2", "b")], test=[row("t", "q3", "t")])
    spec = DedupSpec(data=data, out=tmp_path / "new")
    recipe._write(spec, recipe._open(spec), [{}, {"rejected": "x: y"}, {"rating": "3"}])
    assert reasons(tmp_path / "new") == {"a": "x: y"} and rows_of(tmp_path / "new", "train")[0].meta == {"rating": "3"}
    with pytest.raises(ValueError, match="shorter"):
        recipe._write(spec, recipe._open(spec), [{}, {"rejected": "x: y"}])
