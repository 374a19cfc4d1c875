"""`garage export`: a trained model in the form other tools read, read back and certified before it has a name."""

from dataclasses import dataclass
from pathlib import Path

from garage.core.artifact import read_manifest
from garage.core.events import EventLog, Listener
from garage.export.merge import export_merged
from garage.export.safetensors import export_adapter
from garage.export.verify import Certificate
from garage.specs.export import ExportSpec
from garage.store.locate import locate
from garage.store.report import read_report


@dataclass(frozen=True)
class Exported:
    """What `garage export` returns."""

    path: Path
    format: str
    bytes: int
    certificate: Certificate

    @classmethod
    def read(cls, place: Path) -> "Exported":
        """An export that is already on the disk."""
        facts = dict(read_manifest(place, "export").facts)
        raw = facts["certificate"]
        assert isinstance(raw, dict)
        certificate = Certificate(**raw | {"faults": tuple(raw["faults"])})
        return cls(place, str(facts["format"]), int(str(facts["bytes"])), certificate)

    @property
    def words(self) -> str:
        """The certificate in one line."""
        c = self.certificate
        return f"{c.prompts} prompts, {c.positions} places: mean KL {c.kl:.2g} nats, same first choice at {c.top1:.1%}"


def held_words(bits: str, spec: ExportSpec, c: Certificate) -> str:
    """What an adapter that was trained over a base in few bits loses by its export."""
    if spec.format == "adapter":
        return f"the adapter was trained over its base in {bits}; over the base in 16 bits it answers a little otherwise"
    differ = f"logits differ from the {bits} model's by {c.max_diff:.2g} at most and {c.mean_diff:.2g} on average"
    return f"the adapter is merged into the matrices it was trained on, {bits} ones widened and rounded to {spec.dtype}: {differ}"


def export(spec: ExportSpec, *listeners: Listener) -> Exported:
    """Write `spec.model` to `spec.out`, certified; prints one line.

    Raises:
        UserError: there is no such model, the disk is full, or what was written is not what was trained; nothing is left behind.
    """
    source = locate(spec.model)
    EventLog(None, *listeners).emit("stage", name=f"exporting {spec.format}")
    reports = [read_report(place) for place in spec.reports]
    (export_adapter if spec.format == "adapter" else export_merged)(source, spec, reports=reports)
    made = Exported.read(spec.out)
    if source.bits:
        EventLog(None, *listeners).emit("warning", message=held_words(source.bits, spec, made.certificate))
    EventLog(None, *listeners).emit("artifact", path=str(spec.out), kind_of="export", detail=made.words)
    return made
