"""The model card: what is known of an export, and nothing else.

Facts come from the source's manifest, the adapter's configuration, reports and the base's own card. Paths of this machine are shortened
to their last part. The front matter is YAML whose values are written as JSON, which is YAML.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from garage.core.artifact import read_manifest
from garage.export.verify import Certificate
from garage.store.adapter import AdapterConfig, read_adapter
from garage.store.locate import HUB_ID, Located
from garage.store.report import Report

LEFT_OUT = frozenset({"out", "resume", "data", "model", "device", "tokenizer"})
LOADERS = {"adapter": ("peft", "AutoPeftModelForCausalLM"), "merged": ("transformers", "AutoModelForCausalLM")}
SNIPPET = """from transformers import AutoTokenizer
from {library} import {loader}

path = "."  # this directory, or the name it was uploaded under
tokenizer, model = AutoTokenizer.from_pretrained(path), {loader}.from_pretrained(path)
messages = [{{"role": "user", "content": "What is 2 plus 3?"}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=64)
print(tokenizer.decode(output[0][inputs["input_ids"].shape[1]:], skip_special_tokens=True))"""
CARD = """---
{front}
---

# {name}

{what}. Made with Garage.

## Data

{data}

## Settings

{settings}

## Evaluation

{scores}

## Use

```python
{snippet}
```
{notes}
## Licence

{licence}

## What was checked

Read back from disk and compared with the model that was trained, on the same {c.positions} tokens after {c.prompts} prompts: mean KL
{c.kl:.2e} nats, largest difference of a logit {c.max_diff:.2e}, the same most likely token at {c.top1:.1%} of places, the same greedy
text for {c.greedy:.1%} of prompts.{effect} Nothing beyond that was checked.
"""


def card(source: Located, certificate: Certificate, *, format: str, reports: Sequence[Report]) -> str:
    """README.md of an export."""
    adapter = read_adapter(source.adapter)[0] if source.adapter is not None else None
    manifest = read_manifest(source.newest) if (source.newest / "manifest.json").exists() else None
    spec = manifest.spec if manifest else {}
    data = spec.get("data")
    above = manifest.parents[:1] if manifest and manifest.kind == "model" else ()
    base = adapter.base if adapter else "".join(above)
    base = Path(base).name if Path(base).is_absolute() else base
    licence, (library, loader) = licence_of(source.base), LOADERS[format]
    tags = ["garage", "lora"] if adapter else ["garage"]
    front: dict[str, object] = {"library_name": library, "pipeline_tag": "text-generation", "tags": tags}
    front |= {"license": licence} if licence else {}
    if HUB_ID.fullmatch(base):
        front |= {"base_model": base.partition("@")[0], "base_model_relation": "adapter" if format == "adapter" else "finetune"}
    front |= {"model-index": [{"name": source.name, "results": [_result(report) for report in reports]}]} if reports else {}
    return CARD.format(
        c=certificate,
        front="\n".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in front.items()),
        name=source.name,
        what=("A low-rank adapter" if format == "adapter" else "A whole model") + (f", tuned from {base}" if base else ""),
        data="\n".join(f"- {Path(str(one)).name}" for one in data) if isinstance(data, list) else "Not recorded.",
        settings=_table(("setting", "value"), [(f"`{key}`", json.dumps(value, ensure_ascii=False)) for key, value in _flat(spec)]),
        scores=_table(("model", "task", "items", "strict", "95 % interval", "lenient"), [_score(report) for report in reports]),
        snippet=SNIPPET.format(library=library, loader=loader),
        notes="".join(f"\n{note}\n" for note in _notes(adapter, source.bits, format)) if adapter else "",
        licence=f"The base model's: {licence}." if licence else "The base model states no licence here; ask its authors.",
        effect=f" For scale: tuning moved the model by {certificate.effect:.2e} nats." if certificate.effect is not None else "",
    )


def licence_of(base: Path) -> str:
    """The licence that the base's own card states, or ""."""
    path = base / "README.md"
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    match = re.search(r"^license:[ ]*(\S+)", text.split("---")[1], re.M) if text.startswith("---\n") else None
    return match[1].strip("'\"") if match else ""


def _result(report: Report) -> dict[str, object]:
    metrics = [{"type": "accuracy", "value": v, "name": n} for n, v in (("strict", report.accuracy), ("lenient", report.lenient))]
    return {"task": {"type": "text-generation"}, "dataset": {"type": report.task, "name": report.task}, "metrics": metrics}


def _score(r: Report) -> tuple[str, ...]:
    return r.model, r.task, str(r.n), f"{r.accuracy:.1%}", f"{r.ci95[0]:.1%} to {r.ci95[1]:.1%}", f"{r.lenient:.1%}"


def _flat(spec: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in spec.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif value is not None and (prefix or key not in LEFT_OUT):
            yield prefix + key, value


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |" for cells in (head, ("---",) * len(head), *rows)]
    return "\n".join(lines) if rows else "Not recorded."


def _notes(adapter: AdapterConfig, bits: str, format: str) -> Iterator[str]:
    if bits and format == "adapter":
        yield f"Trained over the base in {bits} and compared over it below; over the base in 16 bits it answers a little otherwise."
    elif bits:
        yield f"Merged into the {bits} matrices it was trained on, widened: this base is not the published one to the last bit."
    if format != "adapter":
        return
    if adapter.is_dora:
        yield "vLLM does not load DoRA adapters; export with `--format merged` for it."
    if (rank := max(adapter.rank, *adapter.rank_pattern.values(), 0)) > 16:
        yield f"vLLM needs `--max-lora-rank {rank}` or more for this adapter."
