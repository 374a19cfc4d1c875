"""The adapter alone, in PEFT's layout: what peft, vLLM and transformers load over the base.

Tensors get the base's published names and `target_modules` the short suffixes, whatever the source wrote; where only some layers are
adapted, the full names, since a suffix would promise the others too. Numbers are stored as they were trained.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from garage.core.errors import UserError
from garage.export.publish import Layout, Prompts, publish, tuned
from garage.export.verify import Certificate
from garage.models.adapters import LoRA, adapter_tensors, attach
from garage.models.layers import Linear, Model
from garage.models.weights import load_model
from garage.specs.export import ExportSpec
from garage.store.adapter import read_adapter, write_adapter
from garage.store.locate import Located
from garage.store.report import Report


def export_adapter(source: Located, spec: ExportSpec, *, reports: Sequence[Report] = (), prompts: Prompts = ()) -> Certificate:
    """Write the adapter of `source` to `spec.out`; a UserError if it has none or the export cannot be certified."""
    if source.adapter is None:
        raise UserError(f"{source.name} is a whole model without an adapter", remedy="export it with --format merged")
    adapter = source.adapter

    def write(place: Path) -> None:
        model = tuned(source)
        config, _ = read_adapter(adapter)
        write_adapter(place, adapter_tensors(model), replace(config, targets=_targets(model)))

    def load(place: Path) -> Model:
        return attach(load_model(source.base, dtype=torch.float32, quantize=source.bits), place).eval()

    return publish(source, spec, Layout("float32", write, load), reports=reports, prompts=prompts)


def _targets(model: Model) -> tuple[str, ...]:
    adapted = [name for name, module in model.named_modules() if isinstance(module, LoRA)]
    suffixes = {name.rpartition(".")[2] for name in adapted}
    left = [name for name, module in model.named_modules() if isinstance(module, Linear) and name.rpartition(".")[2] in suffixes]
    return tuple(adapted if left else sorted(suffixes))
