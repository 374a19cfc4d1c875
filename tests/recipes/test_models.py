"""`garage models` over a cache in the Hub's layout and local directories; nothing is fetched."""

import json

import pytest
from huggingface_hub import constants

from garage.cli import main

REVISIONS = ("a" * 40, "b" * 40)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Two revisions of one model and a data set."""
    home = tmp_path / "hub"
    for revision in REVISIONS:
        place = home / "models--org--small" / "snapshots" / revision
        place.mkdir(parents=True)
        blob = home / "models--org--small" / "blobs" / revision
        blob.parent.mkdir(exist_ok=True)
        blob.write_bytes(b"x" * 1000)
        (place / "config.json").symlink_to(blob)
    refs = home / "models--org--small" / "refs"
    refs.mkdir()
    (refs / "main").write_text(REVISIONS[0])
    (home / "datasets--org--rows" / "snapshots" / ("c" * 40)).mkdir(parents=True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home))
    monkeypatch.setattr("huggingface_hub.utils._cache_manager.HF_HUB_CACHE", str(home), raising=False)
    return home


def said(capsys, *words):
    code = main(["models", *words, "--json"])
    out = capsys.readouterr()
    return code, json.loads(out.out.splitlines()[-1]) if code == 0 else out.err


def test_what_is_here_is_listed(cache, tmp_path, capsys):
    (tmp_path / "runs" / "mine" / "artifacts" / "adapter").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "artifacts" / "adapter" / "adapter_config.json").write_text("{}")
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "config.json").write_text("{}")
    code, found = said(capsys, "list", str(tmp_path / "runs"), str(tmp_path))
    kinds = {(line["kind"], line["name"].removeprefix(f"{tmp_path}/")) for line in found["models"]}
    assert code == 0 and kinds == {
        ("embedded", "nano"), ("adapter", "runs/mine/artifacts/adapter"), ("model", "merged"), ("Hub", "org/small")
    }  # fmt: skip
    assert next(line["bytes"] for line in found["models"] if line["kind"] == "Hub") == 2000


def test_one_revision_or_all_are_deleted_once_it_is_sure(cache, capsys):
    code, why = said(capsys, "rm", "org/small@main")
    assert code == 2 and "--yes" in why and len(list(cache.glob("*/blobs/*"))) == 2
    code, gone = said(capsys, "rm", "org/small@main", "--yes")
    assert code == 0 and gone["bytes"] == 1000 and {p.name for p in cache.glob("*/blobs/*")} == {REVISIONS[1]}
    assert said(capsys, "rm", "org/small", "--yes")[1]["revisions"] == 1
    code, why = said(capsys, "rm", "org/small", "--yes")
    assert code == 2 and "not in the Hub's cache" in why


def test_no_hub_id_and_no_hub(cache, capsys, monkeypatch):
    code, why = said(capsys, "pull", "secret")
    assert code == 2 and "no Hub id" in why
    code, why = said(capsys, "pull", "../secret")
    assert code == 2 and "the Hub did not give" in why
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    code, why = said(capsys, "pull", "org/absent")
    assert code == 2 and "the Hub did not give" in why
