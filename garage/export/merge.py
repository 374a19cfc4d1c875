"""A whole model in the Hub's layout: the update added to the weights in float32, then rounded once to the precision asked for.

DoRA merges with its magnitudes. A base held in few bits is widened: the matrices are those the adapter was trained on, not the published
ones, and what rounding them changes is in the certificate. Without an adapter the weights are written as they are, rounded the same way.
"""

from collections.abc import Sequence
from pathlib import Path

import torch

from garage.export.publish import Layout, Prompts, publish, tuned
from garage.export.verify import Certificate
from garage.models.adapters import merge
from garage.models.layers import Model
from garage.models.quantize import widen
from garage.models.weights import load_model, save_model
from garage.specs.export import ExportSpec
from garage.store.locate import Located
from garage.store.report import Report


def export_merged(source: Located, spec: ExportSpec, *, reports: Sequence[Report] = (), prompts: Prompts = ()) -> Certificate:
    """Write `source` to `spec.out` as one model that needs no adapter; a UserError if it cannot be certified."""
    dtype: torch.dtype = getattr(torch, spec.dtype)

    def write(place: Path) -> None:
        save_model(widen(merge(tuned(source))), place, dtype=dtype, max_shard_bytes=spec.max_shard_bytes)

    return publish(source, spec, Layout(spec.dtype, write, _load), reports=reports, prompts=prompts)


def _load(place: Path) -> Model:
    return load_model(place, dtype=torch.float32).eval()
