"""Artifacts: directories that are written whole or not at all.

An artifact holds its files and a `manifest.json` that says what it is, what it was made from and by which spec. It is written
under a temporary name beside its place, flushed to the disk, and renamed: a reader sees all of it or nothing. A crash leaves at
most a directory whose name starts with `.tmp-`, which the next writer of the same place removes.

Limits: the rename is atomic on one file system only, hence the temporary name is a sibling.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from garage import __version__
from garage.core.errors import UserError

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Manifest:
    """What an artifact says of itself. `id` is `kind` and twelve hex digits of the hash of its files; `facts` are kind-specific."""

    kind: str
    id: str
    parents: tuple[str, ...]
    spec: Mapping[str, object]
    facts: Mapping[str, object]
    version: str
    created: str


@dataclass
class Draft:
    """An artifact being written: put files under `path`, put what its readers need to know in `facts`."""

    path: Path
    facts: dict[str, object] = field(default_factory=dict)


@contextmanager
def writing(place: Path, *, kind: str, parents: Sequence[str] = (), spec: Mapping[str, object] | None = None) -> Iterator[Draft]:
    """Write an artifact to `place`; on any exception nothing of it remains and an earlier artifact there is untouched.

    Raises:
        UserError: `place` exists and is not an artifact of the same kind, or the disk is full or not writable.
    """
    _check_place(place, kind)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        for stale in place.parent.glob(f".tmp-{place.name}-*"):
            shutil.rmtree(stale, ignore_errors=True)
        draft = Draft(Path(tempfile.mkdtemp(prefix=f".tmp-{place.name}-", dir=place.parent)))
    except OSError as error:
        raise disk_error(error, place) from error
    try:
        yield draft
        digest = hash_tree(draft.path)
        created = datetime.now(UTC).isoformat()
        manifest = Manifest(kind, f"{kind}-{digest[:12]}", tuple(parents), spec or {}, draft.facts, __version__, created)
        text = json.dumps(asdict(manifest), indent=1, ensure_ascii=False) + "\n"
        (draft.path / MANIFEST).write_text(text, encoding="utf-8", errors="backslashreplace")  # a file name need not be UTF-8
        draft.path.chmod(0o755)
        _flush_tree(draft.path)
        _replace(draft.path, place)
    except OSError as error:
        raise disk_error(error, place) from error
    finally:
        shutil.rmtree(draft.path, ignore_errors=True)


def read_manifest(place: Path, kind: str | None = None) -> Manifest:
    """The manifest of the artifact at `place`.

    Raises:
        UserError: there is no artifact, its manifest is damaged, or it is of another kind.
    """
    try:
        raw = json.loads((place / MANIFEST).read_text(encoding="utf-8"))
        manifest = Manifest(**{**raw, "parents": tuple(raw["parents"])})
    except FileNotFoundError as error:
        remedy = "give the directory that a garage verb wrote with --out"
        raise UserError(f"{place} is not an artifact: it has no {MANIFEST}", remedy=remedy) from error
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(f"{place / MANIFEST} is damaged: {error}", remedy="write the artifact again") from error
    if kind is not None and manifest.kind != kind:
        raise UserError(f"{place} is a {manifest.kind}, not a {kind}", remedy=f"give the directory of a {kind}")
    return manifest


def stated(place: Path, fact: str) -> str:
    """A fact of the artifact at `place`; empty if it does not state it, or is no artifact of ours."""
    return str(read_manifest(place).facts.get(fact) or "") if (place / MANIFEST).exists() else ""


def write_file(path: Path, data: bytes | str) -> None:
    """Replace one file whole or not at all, flushed to the disk."""
    temporary = path.with_name(f".tmp-{path.name}-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data.encode(errors="backslashreplace") if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _flush(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise disk_error(error, path) from error


def disk_error(error: OSError, place: Path) -> UserError:
    """A failed write, in words a person can act on."""
    remedy = "free space on that disk or choose another --out; nothing was changed there"
    return UserError(f"cannot write {place}: {error.strerror or error}", remedy=remedy)


def hash_file(path: Path) -> str:
    """BLAKE2b of a file's bytes, 32 hex digits, read in 1 MiB pieces."""
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def hash_tree(root: Path) -> str:
    """Hash of the names and bytes of an artifact's files, its manifest apart; the manifest's id is `kind` and its first twelve digits."""
    files = sorted(p for p in root.rglob("*") if p.is_file() and p != root / MANIFEST)
    text = "".join(f"{p.relative_to(root)}\x1f{hash_file(p)}\n" for p in files)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _check_place(place: Path, kind: str) -> None:
    if not place.exists():
        return
    if not place.is_dir() or (any(place.iterdir()) and not (place / MANIFEST).exists()):
        raise UserError(f"{place} exists and was not written by garage", remedy="choose another --out")
    if (place / MANIFEST).exists():
        read_manifest(place, kind)


def _flush_tree(root: Path) -> None:
    for path in [*root.rglob("*"), root]:
        _flush(path)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _replace(new: Path, place: Path) -> None:
    """Rename `new` to `place`; an older artifact there steps aside first and is removed after."""
    old = None
    if place.exists():
        old = Path(tempfile.mkdtemp(prefix=f".tmp-{place.name}-old-", dir=place.parent))
        place.rename(old / "was")
    new.rename(place)
    _flush(place.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)
