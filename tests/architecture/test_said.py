"""What is said: every setting has a description and every verb, field and module name stands in the docs."""

import importlib.util
import inspect
import re
from pathlib import Path

import pytest

from garage.cli import VERBS
from garage.specs.base import Spec
from garage.specs.generate import SAMPLING

REPO = Path(__file__).parents[2]
MODULES = [f"garage.specs.{path.stem}" for path in (REPO / "garage" / "specs").glob("*.py") if path.stem != "__init__"]
CLASSES = {cls for name in MODULES for _, cls in inspect.getmembers(importlib.import_module(name), inspect.isclass)}
SPECS = sorted((cls for cls in CLASSES if issubclass(cls, Spec)), key=str)


@pytest.mark.parametrize("cls", SPECS)
def test_every_field_has_a_description(cls):
    assert [name for name, info in cls.model_fields.items() if not info.description] == []
    assert cls.__doc__


def test_the_reference_is_what_the_specs_say():
    spec = importlib.util.spec_from_file_location("reference", REPO / "docs" / "reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (REPO / "docs" / "reference.md").read_text() == module.reference(), "run `make docs`"


def ignored(fields: set[str], text: str) -> set[str]:
    """Fields that no code outside the specs reads by name."""
    return {name for name in fields if not re.search(rf"\.{name}\b", text)}


def test_every_setting_is_honoured():
    """A field nobody reads is accepted and ignored. The shape of a new model, the map of columns and how to sample are handed on whole."""
    text = "\n".join(path.read_text() for path in (REPO / "garage").rglob("*.py") if path.parent.name != "specs")
    fields = {name for cls in SPECS if cls.__name__ not in ("ArchitectureSpec", "ColumnsSpec") for name in cls.model_fields}
    assert ignored(fields - set(SAMPLING), text) == set()
    assert ignored({"rank", "wings"}, text) == {"wings"}


def test_the_readme_names_every_verb():
    text = (REPO / "README.md").read_text()
    assert [verb for verb in VERBS if f"`{verb}`" not in text and f"garage {verb}" not in text] == []
