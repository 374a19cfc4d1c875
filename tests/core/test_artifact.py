"""Artifacts appear whole or not at all, and say what they are."""

import errno
import json
import os
from pathlib import Path

import pytest

from garage.core import artifact
from garage.core.artifact import read_manifest, write_file, writing
from garage.core.errors import UserError


def test_an_artifact_appears_whole_with_its_manifest(tmp_path):
    with writing(tmp_path / "a", kind="corpus", parents=("dataset-1",), spec={"x": 1}) as draft:
        (draft.path / "f.txt").write_text("hello")
        draft.facts["files"] = 1
        assert not (tmp_path / "a").exists()
    manifest = read_manifest(tmp_path / "a", "corpus")
    assert (manifest.parents, manifest.spec, manifest.facts) == (("dataset-1",), {"x": 1}, {"files": 1})
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_the_same_files_have_the_same_id(tmp_path):
    for name, text in (("a", "x"), ("b", "x"), ("c", "y")):
        with writing(tmp_path / name, kind="corpus") as draft:
            (draft.path / "f").write_text(text)
    ids = [read_manifest(tmp_path / name).id for name in "abc"]
    assert ids[0] == ids[1] != ids[2]


def test_a_failure_leaves_nothing_and_keeps_what_was_there(tmp_path):
    with writing(tmp_path / "a", kind="corpus") as draft:
        (draft.path / "f").write_text("old")
    with pytest.raises(ZeroDivisionError), writing(tmp_path / "a", kind="corpus") as draft:
        (draft.path / "f").write_text("new")
        raise ZeroDivisionError
    assert (tmp_path / "a" / "f").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a"]


def test_rewriting_replaces_whole(tmp_path):
    for text in ("old", "new"):
        with writing(tmp_path / "a", kind="corpus") as draft:
            (draft.path / text).write_text(text)
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["manifest.json", "new"]


def test_other_peoples_directories_are_not_touched(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="not written by garage"), writing(tmp_path / "mine", kind="corpus"):
        pass
    with writing(tmp_path / "d", kind="dataset"):
        pass
    with pytest.raises(UserError, match="is a dataset, not a corpus"), writing(tmp_path / "d", kind="corpus"):
        pass
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "x"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"kind": "corpus"}', json.dumps({"parents": [], "surprise": 1})])
def test_a_damaged_manifest_is_a_user_error(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match="damaged"):
        read_manifest(tmp_path)


def test_a_full_disk_is_a_user_error_that_leaves_nothing(tmp_path, monkeypatch):
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(artifact, "_flush", full)
    with pytest.raises(UserError, match="No space left"), writing(tmp_path / "a", kind="corpus"):
        pass
    with pytest.raises(UserError, match="No space left"):
        write_file(tmp_path / "b.json", "{}")
    assert [p.name for p in tmp_path.iterdir() if p.name != "b.json"] == []


def test_order_of_a_safe_write(tmp_path, monkeypatch):
    """Flush, then rename, then flush the directory: the order that survives a power cut. Its twin without the flush is caught."""
    calls = []
    monkeypatch.setattr(artifact, "_flush", lambda path: calls.append(("flush", path.name)))
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda self, target: (calls.append(("rename", target.name)), rename(self, target))[1])
    with writing(tmp_path / "a", kind="corpus") as draft:
        (draft.path / "f").write_text("x")
    names = [call for call in calls if call[1] in ("f", "manifest.json", "a", tmp_path.name)]
    assert names.index(("flush", "f")) < names.index(("rename", "a")) < names.index(("flush", tmp_path.name))
