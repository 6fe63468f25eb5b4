"""What pyproject.toml promises to those who install the package."""

import importlib
import pathlib
import re
import tomllib

import pytest

import repopt_jax

REPOSITORY = pathlib.Path(__file__).parents[1]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())


@pytest.mark.parametrize("command", PROJECT["project"]["scripts"])
def test_commands_lead_to_functions(command):
    module, function = PROJECT["project"]["scripts"][command].split(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_the_version_is_the_same_wherever_it_is_stated():
    version = PROJECT["project"]["version"]
    assert repopt_jax.__version__ == version
    assert (
        re.search(r"^version: (.*)$", (REPOSITORY / "CITATION.cff").read_text(), re.M)[1] == version
    )
    assert f"## {version} " in (REPOSITORY / "CHANGELOG.md").read_text()


def test_every_part_of_the_package_is_listed_for_contributors():
    table = (REPOSITORY / "CONTRIBUTING.md").read_text()
    rooms = [p for p in (REPOSITORY / "repopt_jax").iterdir() if (p / "__init__.py").exists()]
    assert [room.name for room in rooms if f"{room.name}" not in table] == []
