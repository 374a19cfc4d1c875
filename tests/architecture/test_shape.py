"""The rows of the architecture table that can exist now, each with a broken twin that the same check must catch."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "garage"
_spec = importlib.util.spec_from_file_location("shape", Path(__file__).with_name("shape.py"))
assert _spec and _spec.loader
shape = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(shape)

BELOW_STAGES = {"core", "specs", "tokens", "kernels", "store", "models", "rewards"}
STAGES = {"data", "train", "evals", "prompts", "export", "engine"}
ALLOWED: dict[str, set[str]] = {
    "core": set(),
    "specs": {"core"},
    "tokens": {"core"},
    "kernels": set(),
    "store": {"core"},
    "models": {"core", "kernels", "store"},
    "rewards": {"core"},
    "data": {"core", "specs", "tokens", "store"},
    "train": {"core", "specs", "kernels", "store", "models"},
    "evals": {"core", "specs", "tokens", "store", "rewards"},
    "prompts": {"core", "specs", "store", "rewards"},
    "export": {"core", "specs", "tokens", "store", "models"},
    "engine": {"core", "specs", "tokens", "kernels", "store", "models"},
    "serve": {"core", "specs", "tokens", "engine"},
    "recipes": BELOW_STAGES | STAGES | {"serve"},
    "cli": {"core", "specs", "recipes"},
    "__main__": {"cli"},
    "platform": {"core", "specs", "tokens", "store"},
}
TORCH_FREE = {f"garage.{part}" for part in ("core", "specs", "tokens", "rewards", "data", "evals", "prompts", "platform", "cli")} | {
    f"garage.store.{name}" for name in ("corpus", "dataset", "locate", "report")
}
BUDGET = {
    "core": 640, "specs": 1340, "tokens": 700, "kernels": 2870, "store": 860, "models": 2550, "rewards": 600, "data": 4130, "train": 2000,
    "evals": 900, "prompts": 300, "export": 1150, "engine": 2820, "serve": 3040, "recipes": 4180, "cli": 250, "platform": 2300,
}  # fmt: skip
TOTAL = 26_400
JOURNEYS = {"garage.recipes.sft": 9500, "garage.recipes.serve": 11250}


def write(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_packages_import_only_what_their_row_lists():
    assert shape.layer_faults(ROOT, ALLOWED, TORCH_FREE) == []


def test_an_import_against_the_arrows_is_caught(tmp_path):
    root = tmp_path / "garage"
    write(root, "core/a.py", "import garage.engine.engine\n")
    write(root, "data/b.py", "def late():\n    from garage.train import loop\n")
    write(root, "evals/c.py", "import torch\n")
    faults = shape.layer_faults(root, ALLOWED, TORCH_FREE)
    assert {fault.split(":")[0] for fault in faults} == {
        "garage.core.a -> garage.engine.engine",
        "garage.data.b -> garage.train",
        "garage.data.b -> garage.train.loop",
        "garage.evals.c -> torch",
    }


def test_files_functions_nests_and_parameters_stay_short():
    assert shape.length_faults(ROOT) == []


@pytest.mark.parametrize(
    "text",
    [
        "x = 1\n" * 401,
        "def f():\n" + "    x = 1\n" * 60,
        "def f():\n if a:\n  for b in c:\n   while d:\n    with e:\n     pass\n",
        "def f(a, b, c, d, e, f, g, h): pass\n",
    ],
)
def test_a_long_file_function_nest_or_parameter_list_is_caught(tmp_path, text):
    write(tmp_path / "garage", "core/a.py", text)
    assert len(shape.length_faults(tmp_path / "garage")) == 1


def test_elif_is_not_a_nest(tmp_path):
    write(tmp_path / "garage", "core/a.py", "def f(x):\n if x == 1:\n  pass\n" + "".join(f" elif x == {n}:\n  pass\n" for n in range(9)))
    assert shape.length_faults(tmp_path / "garage") == []


def test_every_package_keeps_its_budget():
    lines = shape.lines_of(ROOT)
    over = {part: (n, BUDGET[part]) for part, n in lines.items() if part in BUDGET and n > BUDGET[part]}
    assert not over and set(lines) - set(BUDGET) <= {"", "__main__"}
    assert sum(lines.values()) <= TOTAL


@pytest.mark.parametrize("start", JOURNEYS)
def test_journeys_stay_short(start):
    assert 0 < shape.journey(ROOT, start) <= JOURNEYS[start]


def test_a_longer_journey_is_counted(tmp_path):
    write(tmp_path / "garage", "a.py", "import garage.b\n")
    write(tmp_path / "garage", "b.py", "x = 1\n" * 99)
    assert shape.journey(tmp_path / "garage", "garage.a") == 100


def test_every_module_has_a_header():
    bare = [name for name, (path, tree) in shape.modules(ROOT).items() if path.stat().st_size and not shape.ast.get_docstring(tree)]
    assert bare == []


def fresh(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60).stdout


def test_torch_free_modules_reach_no_torch():
    names = [name for name in shape.modules(ROOT) if name in TORCH_FREE or ".".join(name.split(".")[:2]) in TORCH_FREE]
    code = "import importlib, sys\n" + "".join(f"importlib.import_module({name!r})\n" for name in names) + "print('torch' in sys.modules)"
    assert fresh(code).strip() == "False"


def test_the_torch_check_can_tell():
    assert fresh("import sys, garage.models.layers\nprint('torch' in sys.modules)").strip() == "True"


def test_the_command_line_starts_quickly():
    code = "import time; t = time.process_time(); import garage.cli; print(time.process_time() - t)"
    assert min(float(fresh(code)) for _ in range(3)) < 0.5
    code = code.replace("print(", "garage.cli.main(['--help']); print(")
    assert min(float(fresh(code).splitlines()[-1]) for _ in range(3)) < 1.0
