"""`garage models`: what is here, and the Hub's own cache. There is no second cache: HF_HOME and its like are obeyed.

Only what a model is read from is fetched: weights as safetensors, JSON, chat templates, tokenizers; never a pickle.
"""

import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from garage.core.errors import UserError
from garage.core.events import EventLog, Listener
from garage.specs.models import ModelsListSpec, ModelsPullSpec, ModelsRmSpec
from garage.store.locate import HUB_ID, locate

FORMS = {"config.json": "model", "adapter_config.json": "adapter"}


@dataclass(frozen=True)
class ModelLine:
    """One model that is here. `used` is when it was last read, in seconds since 1970; None where nobody notes it."""

    name: str
    kind: str
    path: str
    bytes: int
    used: float | None = None


@dataclass(frozen=True)
class ModelList:
    """What `garage models` says."""

    models: tuple[ModelLine, ...]


@dataclass(frozen=True)
class Removed:
    """What `garage models rm` gave back."""

    model: str
    revisions: int
    bytes: int


def list_models(spec: ModelsListSpec, *_: Listener) -> ModelList:
    """The models that are here."""
    nano = locate("nano").base
    lines = [ModelLine("nano", "embedded", str(nano), _size(nano)), *_local(spec.places), *_cached()]
    for line in lines:
        used = "" if line.used is None else time.strftime("  last used %Y-%m-%d", time.localtime(line.used))
        print(f"{line.name}  {line.kind}  {line.bytes / 1e9:.2f} GB{used}")
    return ModelList(tuple(lines))


def pull(spec: ModelsPullSpec, *listeners: Listener) -> ModelLine:
    """Fetch a model, or what is missing of it.

    Raises:
        UserError: it is no Hub id, or the Hub does not have it or cannot be reached.
    """
    _require_id(spec.model)
    EventLog(None, *listeners).emit("stage", name="fetching", detail=spec.model)
    base = locate(f"{spec.model}").base
    print(f"{spec.model} is at {base}")
    return ModelLine(spec.model, "Hub", str(base), _size(base))


def remove(spec: ModelsRmSpec, *_: Listener) -> Removed:
    """Delete a model from the cache, once it is confirmed.

    Raises:
        UserError: it is not in the cache, or nobody confirms it.
    """
    _require_id(spec.model)
    name, _at, revision = spec.model.partition("@")
    cache = _scan()
    repos = [repo for repo in cache.repos if repo.repo_type == "model" and repo.repo_id == name] if cache else []
    found = [r for repo in repos for r in repo.revisions if not revision or r.commit_hash.startswith(revision) or revision in r.refs]
    if not found:
        raise UserError(f"{spec.model} is not in the Hub's cache", remedy="garage models list says what is")
    plan = cache.delete_revisions(*(r.commit_hash for r in found))
    size = int(plan.expected_freed_size)
    if not spec.yes and not _confirmed(f"Delete {spec.model}, {len(found)} revisions, {size / 1e9:.2f} GB? [y/N] "):
        raise UserError("nothing was deleted", remedy="answer y, or give --yes")
    plan.execute()
    return Removed(spec.model, len(found), size)


def _local(places: Iterable[Path]) -> list[ModelLine]:
    """Models and adapters in `places` and one or, in runs, three levels below."""
    lines: dict[str, ModelLine] = {}
    for place, depth, (file, kind) in product(places, ("", "*/", "*/artifacts/*/"), FORMS.items()):
        for path in sorted(place.glob(depth + file)):
            home = path.parent.resolve()
            lines.setdefault(str(home), ModelLine(str(path.parent), kind, str(home), _size(home)))
    return list(lines.values())


def _cached() -> list[ModelLine]:
    cache = _scan()
    repos = sorted((r for r in cache.repos if r.repo_type == "model"), key=lambda r: str(r.repo_id)) if cache else []
    return [ModelLine(r.repo_id, "Hub", str(r.repo_path), r.size_on_disk, r.last_accessed) for r in repos]


def _scan() -> Any:
    """The Hub's cache, or None while there is none."""
    from huggingface_hub import scan_cache_dir  # slow to import, and needed only here
    from huggingface_hub.errors import CacheNotFound

    try:
        return scan_cache_dir()
    except CacheNotFound:
        return None


def _size(place: Path) -> int:
    return sum(path.stat().st_size for path in place.iterdir() if path.is_file())


def _require_id(model: str) -> None:
    if not HUB_ID.fullmatch(model):
        raise UserError(f"{model!r} is no Hub id", remedy="write org/name or org/name@revision")


def _confirmed(question: str) -> bool:
    if not sys.stdin.isatty():
        return False
    print(question, end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")
