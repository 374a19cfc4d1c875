"""`garage doctor`: is this machine, and this install, able to do the work? Each check says what it found and what to do."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from dataclasses import dataclass

import psutil
import torch

from garage.core.errors import UserError
from garage.core.events import Listener
from garage.recipes.maths import Difference, differences
from garage.specs.runs import DoctorSpec
from garage.store.locate import locate

EXTRAS = {"server": ("fastapi", "uvicorn", "prometheus_client"), "docs": ("xberg", "rensa"), "teacher": ("openai",),
          "data": ("datasets", "pyarrow")}  # fmt: skip
NEEDED_MEMORY, NEEDED_DISK = 4 << 30, 2 << 30


@dataclass(frozen=True)
class Check:
    """One thing looked at. `remedy` is empty when all is well."""

    name: str
    ok: bool
    detail: str
    remedy: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """All checks."""

    checks: tuple[Check, ...]


def doctor(spec: DoctorSpec, *_: Listener) -> Diagnosis:
    """Look at the interpreter, torch, the processor, memory, disk, extras and the embedded model; print a line each."""
    checks = [_python(), _torch(), _processor(), _memory(), _disk(spec), *map(_extra, EXTRAS), _nano()]
    checks += map(_agreement, differences("cuda" if torch.cuda.is_available() else "cpu")) if spec.math else []
    for check in checks:
        print(f"{'ok ' if check.ok else 'NO '} {check.name:<16} {check.detail}")
        if check.remedy:
            print(f"    remedy: {check.remedy}")
    return Diagnosis(tuple(checks))


def _python() -> Check:
    return Check("python", sys.version_info >= (3, 11), f"{platform.python_version()} on {platform.platform()}")


def _torch() -> Check:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU: everything runs on the CPU"
    return Check("torch", True, f"{torch.__version__}, {gpu}")


def _processor() -> Check:
    has_bf16 = "avx512_bf16" in _cpu_flags() or torch.cuda.is_available()
    cores = f"{psutil.cpu_count(logical=False)} cores, {len(os.sched_getaffinity(0))} usable"
    detail = f"{cores}, bf16 {'in' if has_bf16 else 'not in'} hardware"
    remedy = "" if has_bf16 else "training works; --fit.dtype float32 may be quicker here"
    return Check("processor", True, detail, remedy)


def _cpu_flags() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next((line for line in file if line.startswith("flags")), "")
    except OSError:
        return ""


def _memory() -> Check:
    free = psutil.virtual_memory().available
    remedy = "" if free >= NEEDED_MEMORY else "close other programs; the demo needs about 2 GB"
    return Check("memory", free >= NEEDED_MEMORY, f"{free / 1e9:.1f} GB free", remedy)


def _disk(spec: DoctorSpec) -> Check:
    free = shutil.disk_usage(spec.place).free
    return Check("disk", free >= NEEDED_DISK, f"{free / 1e9:.1f} GB free at {spec.place}", "" if free >= NEEDED_DISK else "free some space")


def _extra(name: str) -> Check:
    missing = [package for package in EXTRAS[name] if importlib.util.find_spec(package) is None]
    if missing:
        return Check(f"extra {name}", False, f"{', '.join(missing)} not installed", f"pip install 'llm-garage[{name}]'")
    return Check(f"extra {name}", True, ", ".join(f"{p} {importlib.metadata.version(p.replace('_', '-'))}" for p in EXTRAS[name]))


def _agreement(found: Difference) -> Check:
    ok = found.largest <= found.allowed  # False for NaN
    remedy = "" if ok else "do not train here: compare with another machine, then with another torch"
    return Check(found.name, ok, f"largest difference {found.largest:.1e} of the largest entry, allowed {found.allowed:.0e}", remedy)


def _nano() -> Check:
    try:
        return Check("embedded model", True, str(locate("nano").base.name) + " is there")
    except UserError as error:
        return Check("embedded model", False, str(error.args[0]), error.remedy)
