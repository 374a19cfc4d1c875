"""What a person installs: the core is light, and nothing is declared that no module imports."""

import ast
import importlib.metadata as metadata
import re
import tomllib
from pathlib import Path

REPO = Path(__file__).parents[2]
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
CORE_MEGABYTES = 150
IMPORTED_AS = {"pyyaml": "yaml"}


def name_of(requirement: str) -> str:
    return re.match(r"[\w.-]+", requirement)[0]


def closure(names: set[str], *, without: set[str]) -> set[str]:
    """`names` and all they require without extras, less `without` and what only those require."""
    done: set[str] = set()
    todo = sorted(names - without)
    while todo:
        name = todo.pop()
        if name.lower() not in {n.lower() for n in done | without}:
            done.add(name)
            needs = [r for r in metadata.requires(name) or [] if "extra ==" not in r]
            todo += [name_of(r) for r in needs if is_installed(name_of(r))]
    return done


def is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def megabytes(name: str) -> float:
    files = metadata.files(name) or []
    return sum(path.stat().st_size for file in files if (path := Path(str(file.locate()))).is_file()) / 1e6


def test_the_core_is_light_beside_torch():
    names = closure({name_of(r) for r in PROJECT["dependencies"]}, without={"torch"})
    sizes = {name: megabytes(name) for name in names}
    assert sizes["numpy"] > 10  # the measure works
    assert sum(sizes.values()) <= CORE_MEGABYTES, sizes


def test_every_declared_dependency_is_imported():
    trees = [ast.parse(path.read_text()) for path in (REPO / "garage").rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    imported = {alias.name.split(".")[0] for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {(node.module or "").split(".")[0] for node in nodes if isinstance(node, ast.ImportFrom)}
    extras = PROJECT["optional-dependencies"]
    optional = [r for name in ("server", "docs", "teacher", "data") for r in extras[name]]
    declared = [name_of(r) for r in [*PROJECT["dependencies"], *optional]]
    assert [name for name in declared if IMPORTED_AS.get(name, name.replace("-", "_")) not in imported] == []
