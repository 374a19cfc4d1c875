"""What a person means by MODEL: `nano`, a directory, a run, an artifact, or a Hub id.

    nano                  the model that is part of the package
    DIR                   a directory in the Hub's layout (config.json), a PEFT adapter (adapter_config.json), or a run
    org/name[@revision]   a Hub repository, taken from the Hub's own cache, downloaded if the Hub may be reached

A name that is both a directory and a Hub id means the directory.
"""

import json
import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from garage.core.artifact import MANIFEST, read_manifest, stated
from garage.core.errors import UserError
from garage.store.fingerprint import check_base

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
WEIGHTS = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model")


@dataclass(frozen=True)
class Located:
    """A model on this disk: the base's directory and, if it is tuned by one, the adapter's."""

    name: str
    base: Path
    adapter: Path | None = None

    @property
    def is_local(self) -> bool:
        """Known by its directory only: neither embedded nor from the Hub."""
        return self.name != "nano" and "/" not in self.name

    @property
    def newest(self) -> Path:
        """The directory whose tokenizer and chat template count."""
        return self.adapter or self.base

    @property
    def id(self) -> str:
        """What artifacts made from it name as their parent: the artifact's id, or the name of a model that is none of ours."""
        return read_manifest(self.newest).id if (self.newest / MANIFEST).exists() else self.name

    @property
    def template_hash(self) -> str:
        """The template that the artifact states; empty for a model that is none of ours."""
        return stated(self.newest, "template_hash")

    @property
    def bits(self) -> str:
        """How the base was held while the adapter was trained: "nf4", "int8", or empty for as it is."""
        return "" if self.adapter is None else stated(self.adapter, "quantize")


def locate(model: str) -> Located:
    """Find `model`.

    Raises:
        UserError: there is no such directory, it holds no model, an adapter's base is another one than it was trained on, or the Hub does
            not have it or cannot be reached.
    """
    if model == "nano":
        return Located("nano", Path(str(files("garage") / "assets" / "nano")))
    place = Path(model).expanduser()
    if place.is_dir():
        return _in_directory(place.resolve())
    if HUB_ID.fullmatch(model) and not place.exists():
        return Located(model, _from_hub(model))
    raise UserError(f"there is no model {model!r}", remedy="give a directory, a Hub id (org/name), a run, or nano")


def locate_adapter(name: str) -> Path:
    """The directory of an adapter: in PEFT's layout, a run that wrote one, or a Hub repository.

    Raises:
        UserError: there is no such directory or no adapter in it, or the Hub does not have it or cannot be reached.
    """
    place = Path(name).expanduser()
    if not place.exists() and HUB_ID.fullmatch(name):
        place = _from_hub(name)
    found = next((inner for inner in (place, place / "artifacts" / "adapter") if (inner / "adapter_config.json").exists()), None)
    if found is None:
        raise UserError(f"there is no adapter at {name!r}", remedy="give a directory with adapter_config.json, a run, or a Hub id")
    return found.resolve()


def _in_directory(place: Path) -> Located:
    if (place / "adapter_config.json").exists():
        base = locate(_base_of(place)).base
        check_base(place, base)
        return Located(_name(place), base, place)
    if (place / "config.json").exists():
        return Located(_name(place), place)
    for inner in (place / "artifacts" / "adapter", place / "artifacts" / "model"):
        if inner.is_dir():
            found = _in_directory(inner)
            return Located(place.name, found.base, found.adapter)
    if (place / "spec.json").exists():
        raise UserError(f"the run {place} has not written a model yet", remedy=f"finish it first, with --resume {place}")
    remedy = "give a directory in the Hub's layout, with config.json or adapter_config.json"
    raise UserError(f"{place} holds no model", remedy=remedy)


def _name(place: Path) -> str:
    """A run's artifact is called after its run."""
    return place.parent.parent.name if place.parent.name == "artifacts" else place.name


def _base_of(adapter: Path) -> str:
    try:
        base = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
    except ValueError as error:
        raise UserError(f"{adapter / 'adapter_config.json'} is damaged: {error}", remedy="export the adapter again") from error
    if not isinstance(base, str) or not base or Path(base).expanduser() == adapter:
        remedy = "set base_model_name_or_path in its adapter_config.json"
        raise UserError(f"{adapter} does not say which base model it belongs to", remedy=remedy)
    return base


def _from_hub(model: str) -> Path:
    from huggingface_hub import snapshot_download  # slow to import, and needed only here
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    name, _, revision = model.partition("@")
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=list(WEIGHTS)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        remedy = "check the name, your network and, for gated models, HF_TOKEN; or give a local directory"
        raise UserError(f"the Hub did not give {model!r}: {str(error).splitlines()[0]:.200}", remedy=remedy) from error
