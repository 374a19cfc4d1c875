"""Writes a bench's result to bench/results/NAME.json: the machine, the versions, the command and the raw figures.

A figure without its machine and command is not a result. Benches call `record` last; a second run replaces the file.
"""

import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import psutil
import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "numpy", "safetensors", "tokenizers", "transformers", "peft", "trl", "triton", "gguf", "vllm")


def record(name: str, command: Sequence[str] | str, figures: Mapping[str, object]) -> Path:
    """Store the figures of one run and return where. `command` is what a person types to repeat it."""
    result: dict[str, object] = {"name": name, "command": command if isinstance(command, str) else shlex.join(command)}
    result |= {"date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine(), "versions": versions()}
    RESULTS.mkdir(exist_ok=True)
    place = RESULTS / f"{name}.json"
    place.write_text(json.dumps({**result, "figures": figures}, indent=1, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
    return place


def typed() -> str:
    """The command this process was started with, from the repository's root."""
    return shlex.join(["python", os.path.relpath(sys.argv[0], Path(__file__).parent.parent), *sys.argv[1:]])


def machine() -> dict[str, object]:
    """What the figures were measured on, and how busy it was."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processor": _processor(),
        "cores": usable,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.platform(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }


def versions() -> dict[str, str]:
    """Python and the packages that are installed of those a result may depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
