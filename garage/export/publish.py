"""What every export has beside its weights, and the order: write, read back, certify, describe; or leave nothing.

Tokenizer files and chat template are those the model was tuned with. `generation_config.json` keeps what the base's authors say about
sampling, and names every id that ends an answer, so that other tools stop where we do.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from garage.core.artifact import stated, writing
from garage.core.errors import UserError
from garage.core.types import Message
from garage.export.card import card
from garage.export.verify import Certificate, certify, default_prompts, distance, replay, voice_faults
from garage.models.adapters import attach
from garage.models.layers import Model
from garage.models.weights import load_model
from garage.specs.export import ExportSpec
from garage.store.fingerprint import FACT
from garage.store.locate import Located
from garage.store.report import Report
from garage.tokens.tokenizer import Tokenizer
from garage.tokens.voice import Voice

Prompts = Sequence[tuple[Message, ...]]


@dataclass(frozen=True)
class Layout:
    """How one form of export is written and read back; `dtype` is the precision of what is stored."""

    dtype: str
    write: Callable[[Path], None]
    load: Callable[[Path], Model]


def publish(source: Located, spec: ExportSpec, layout: Layout, *, reports: Sequence[Report], prompts: Prompts) -> Certificate:
    """Write, verify and describe an export at `spec.out`; `reports` go on its card, `prompts` are replayed in place of our own.

    A UserError, and nothing at `spec.out`, if the export differs from its source by more than its precision explains.
    """
    voice = Voice.load(source.newest if (source.newest / "tokenizer.json").exists() else source.base)
    prompts = prompts or default_prompts(spec.prompts)
    with writing(spec.out, kind="export", parents=(source.id,), spec=spec.resolved()) as draft:
        layout.write(draft.path)
        write_voice(source, voice, draft.path)
        certificate = _certificate(source, voice, prompts, place=draft.path, layout=layout)
        if not certificate.ok:
            message = f"the export of {source.name} is not what was trained: {'; '.join(certificate.faults)}"
            raise UserError(message, remedy="export with --dtype float32; if that fails too, report it with this message")
        (draft.path / "certificate.json").write_text(json.dumps(asdict(certificate), indent=1) + "\n", encoding="utf-8")
        (draft.path / "README.md").write_text(card(source, certificate, format=spec.format, reports=reports), encoding="utf-8")
        size = sum(path.stat().st_size for path in draft.path.rglob("*") if path.is_file())
        facts = {"format": spec.format, "dtype": layout.dtype, "quantize": source.bits, "bytes": size}
        facts |= {FACT: stated(source.newest, FACT)} if spec.format == "adapter" else {}
        draft.facts.update(voice.facts, **facts, certificate=asdict(certificate))
    return certificate


def tuned(source: Located, bits: str = "") -> Model:
    """The model to export, in float32, its adapter attached; the base as it was held in training, or in `bits`."""
    model = load_model(source.base, dtype=torch.float32, quantize=bits or source.bits)
    return (attach(model, source.adapter) if source.adapter is not None else model).eval()


def write_voice(source: Located, voice: Voice, place: Path) -> None:
    """Tokenizer files, chat template and generation config."""
    voice.save(place)
    theirs, ours = source.base / "generation_config.json", place / "generation_config.json"
    said = {key: value for path in (ours, theirs) if path.exists() for key, value in json.loads(path.read_text(encoding="utf-8")).items()}
    said["eos_token_id"] = list(dict.fromkeys([*Tokenizer.load(source.base).eos_ids, *voice.chat.stop_ids]))
    ours.write_text(json.dumps(said, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _certificate(source: Located, voice: Voice, prompts: Prompts, *, place: Path, layout: Layout) -> Certificate:
    model = tuned(source)
    replayed = replay(model, voice, prompts)
    found = distance(model, layout.load(place), replayed)
    effect = None if source.adapter is None else distance(model, tuned(replace(source, adapter=None), source.bits), replayed).kl
    faults = voice_faults(voice, Voice.load(place), prompts, replayed)
    return certify(found, dtype=layout.dtype, effect=effect, replayed=replayed, voice_faults=faults)
