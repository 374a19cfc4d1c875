"""Checkpoints are whole or absent, damage is found, and the last good one survives a full disk."""

import json
import os
import resource
from pathlib import Path

import pytest
import torch

from garage.core import artifact
from garage.core.errors import UserError
from garage.store import checkpoint as store
from garage.store.checkpoint import Checkpoint, latest, place_of, prune, read_checkpoint, saved_steps, write_checkpoint

torch.set_num_threads(1)


def made(step, value=1.0, size=1000):
    tensors = {"weights": {"w": torch.full((size,), value)}, "optimizer": {"m.w": torch.rand(size)}, "rng": {"cpu": torch.get_rng_state()}}
    return Checkpoint(step, tensors, {"progress": {"tokens": step * 10}})


def test_what_is_written_is_read_back_bit_for_bit(tmp_path):
    original = made(7, value=1 / 3)
    place = write_checkpoint(tmp_path, original)
    back = read_checkpoint(place)
    assert back.step == 7 and back.state == original.state
    for group, tensors in original.tensors.items():
        assert back.tensors[group].keys() == tensors.keys()
        assert all(torch.equal(back.tensors[group][name], tensor) for name, tensor in tensors.items())
    assert sorted(p.suffix for p in place.iterdir()) == [".json", ".json", ".safetensors", ".safetensors", ".safetensors"]


def names(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


@pytest.mark.parametrize("name", ["weights.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_to_any_file_is_found_and_the_one_before_is_used(tmp_path, name, damage):
    write_checkpoint(tmp_path, made(1, 1.0))
    place = write_checkpoint(tmp_path, made(2, 2.0))
    file = place / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    if damage == "remove":
        file.unlink()
    else:
        file.write_bytes(data if damage == "flip" else data[: len(data) // 2])
    with pytest.raises(UserError, match="damaged"):
        read_checkpoint(place)
    found = latest(tmp_path)
    assert found.checkpoint is not None and found.checkpoint.step == 1
    assert len(found.damaged) == 1 and "step-00000002" in found.damaged[0]
    write_checkpoint(tmp_path, made(2, 2.0))
    again = latest(tmp_path)
    assert again.checkpoint is not None and again.checkpoint.step == 2 and not again.damaged


def test_a_checkpoint_without_its_manifest_is_passed_over(tmp_path):
    write_checkpoint(tmp_path, made(1))
    (write_checkpoint(tmp_path, made(2)) / "manifest.json").unlink()
    found = latest(tmp_path)
    assert found.checkpoint is not None and found.checkpoint.step == 1 and len(found.damaged) == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_neither_written_nor_read(tmp_path, bad, monkeypatch):
    write_checkpoint(tmp_path, made(1))
    poisoned = made(2)
    poisoned.tensors["weights"]["w"][3] = bad
    with pytest.raises(UserError, match="NaN or infinity"):
        write_checkpoint(tmp_path, poisoned)
    assert saved_steps(tmp_path) == [1]
    with monkeypatch.context() as patch:  # as an older program without the check might have written it
        patch.setattr(store, "_not_finite", lambda tensors: None)
        write_checkpoint(tmp_path, poisoned)
    found = latest(tmp_path)
    assert found.checkpoint is not None and found.checkpoint.step == 1 and "NaN" in found.damaged[0]


def test_prune_keeps_the_newest_and_the_best_and_sweeps_what_crashes_left(tmp_path):
    for step in (1, 2, 3, 4, 5):
        write_checkpoint(tmp_path, made(step))
    (tmp_path / "checkpoints" / ".tmp-step-00000006-x").mkdir()
    prune(tmp_path, 2, marked=(2,))
    assert saved_steps(tmp_path) == [2, 4, 5]
    assert names(tmp_path) == ["step-00000002", "step-00000004", "step-00000005"]


def test_a_full_disk_leaves_the_last_checkpoint_and_says_so(tmp_path):
    """A file size limit makes the write fail inside the system call, as a full disk does."""
    write_checkpoint(tmp_path, made(1))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(UserError, match="cannot write") as caught:
            write_checkpoint(tmp_path, made(2, size=100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "free space" in caught.value.remedy
    assert names(tmp_path) == ["step-00000001"]
    found = latest(tmp_path)
    assert found.checkpoint is not None and found.checkpoint.step == 1 and not found.damaged


@pytest.mark.parametrize("call", ["_flush", "_replace", "hash_tree"])
def test_a_failure_at_any_later_point_of_writing_leaves_the_last_checkpoint(tmp_path, monkeypatch, call):
    write_checkpoint(tmp_path, made(1))

    def fail(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(artifact, call, fail)
        with pytest.raises(UserError, match="No space left"):
            write_checkpoint(tmp_path, made(2))
    assert names(tmp_path) == ["step-00000001"]


def write_order(run, monkeypatch):
    """The inodes flushed and renamed by one write, in order; kill -9 keeps the page cache, so only the order of calls can show this."""
    calls, real_fsync, real_rename = [], os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append(("fsync", os.fstat(fd).st_ino)), real_fsync(fd)))
    monkeypatch.setattr(os, "rename", lambda a, b: (calls.append(("rename", Path(a).stat().st_ino)), real_rename(a, b)))
    place = write_checkpoint(run, made(1))
    at = calls.index(("rename", place.stat().st_ino))
    needed = {p.stat().st_ino for p in [place, *place.iterdir()]}
    return needed <= {inode for _, inode in calls[:at]}, ("fsync", place.parent.stat().st_ino) in calls[at:]


def test_every_file_and_both_directories_are_flushed_around_the_rename(tmp_path, monkeypatch):
    assert write_order(tmp_path, monkeypatch) == (True, True)


def test_the_order_check_sees_a_missing_flush(tmp_path, monkeypatch):
    monkeypatch.setattr(artifact, "_flush", lambda path: None)
    assert write_order(tmp_path, monkeypatch) == (False, False)


def test_state_is_plain_json_and_refuses_numbers_json_cannot_hold(tmp_path):
    place = write_checkpoint(tmp_path, made(3))
    assert json.loads((place / "state.json").read_text())["step"] == 3
    with pytest.raises(ValueError, match="JSON"):
        write_checkpoint(tmp_path, Checkpoint(4, made(4).tensors, {"loss": float("nan")}))
    assert saved_steps(tmp_path) == [3] and place_of(tmp_path, 3) == place
