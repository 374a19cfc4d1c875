"""File names that are no UTF-8 pass through manifests, events and what is printed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from garage.core.artifact import read_manifest
from garage.store.corpus import read_documents


def test_a_name_in_another_encoding_is_read_and_reported(tmp_path: Path) -> None:
    try:
        (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text("The bar opens at nine.\n")
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    words = ["ingest", os.fsencode(tmp_path) + b"/caf\xe9.txt", "--out", tmp_path / "out", "--json"]
    done = subprocess.run([sys.executable, "-m", "garage", *words], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["documents"] == 1
    assert "caf" in str(read_manifest(tmp_path / "out").spec["paths"])
    assert [text for _, text in read_documents(tmp_path / "out")] == ["The bar opens at nine."]
