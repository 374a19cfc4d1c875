"""What is said: every setting has a description and every verb, field and module name stands in the docs."""

import importlib
import inspect
import re
from pathlib import Path

import pytest

from garage.cli import VERBS
from garage.specs.base import Spec
from garage.specs.options import all_fields

REPO = Path(__file__).parents[2]
MODULES = [f"garage.specs.{path.stem}" for path in (REPO / "garage" / "specs").glob("*.py") if path.stem != "__init__"]
CLASSES = {cls for name in MODULES for _, cls in inspect.getmembers(importlib.import_module(name), inspect.isclass)}
SPECS = sorted((cls for cls in CLASSES if issubclass(cls, Spec)), key=str)


@pytest.mark.parametrize("cls", SPECS)
def test_every_field_has_a_description(cls):
    assert [name for name, info in cls.model_fields.items() if not info.description] == []
    assert cls.__doc__


def test_every_verb_and_option_is_in_the_reference():
    text = (REPO / "docs" / "reference.md").read_text()
    for verb, entry in VERBS.items():
        section = re.search(rf"^## `garage {verb}`\n(.*?)(?=^## |\Z)", text, re.S | re.M)
        assert section, f"docs/reference.md lacks {verb}: run `make docs`"
        module, _, name = entry.spec.partition(":")
        cls = getattr(importlib.import_module(f"garage.{module}"), name)
        missing = [option for option, _ in all_fields(cls) if f"`--{option}`" not in section[1]]
        assert missing == [], f"run `make docs`: {verb} lacks {missing}"


def test_the_readme_names_every_verb():
    text = (REPO / "README.md").read_text()
    assert [verb for verb in VERBS if f"`{verb}`" not in text and f"garage {verb}" not in text] == []
