"""The documents' commands name configurations, fields and flags that there are."""

import pathlib
import re
import runpy
import shlex

import jax
import numpy as np
import pytest
import result_tables
import write_tables

from repopt_jax.training.devices import make_mesh, samples_per_group
from repopt_jax.training.workdir import SMALLEST_SHARE

REPOSITORY = pathlib.Path(__file__).parents[1]
DOCUMENTS = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]


def train_commands(document):
    text = document.read_text().replace("\\\n", " ")
    return re.findall(r"python train\.py ([^\n`&\"]*)", text)


COMMANDS = [(d.name, c.strip()) for d in DOCUMENTS for c in train_commands(d)]


@pytest.mark.parametrize(("document", "arguments"), COMMANDS)
def test_commands_name_fields_that_there_are(document, arguments):
    words = shlex.split(arguments.replace("DIR", "runs/x").replace("BUCKET", "b"))
    config_file = "configs/digits.py"
    for word in words:
        if word.startswith("--config="):
            config_file = word.removeprefix("--config=")
    path, _, argument = config_file.partition(":")
    if path == "FILE":
        return
    get_config = runpy.run_path(str(REPOSITORY / path))["get_config"]
    config = get_config(argument) if argument else get_config()
    for word in words:
        if found := re.match(r"--config\.([\w.]+)=", word):
            value = config
            for key in found[1].split("."):
                assert key in value, (document, word)
                value = value[key]


def test_commands_for_many_devices_divide_their_batches():
    """Two nodes of 8 GPUs, and a slice of 16 TPU devices."""
    config = runpy.run_path(str(REPOSITORY / "configs" / "imagenet.py"))["get_config"]()
    sizes = [re.search(r"target\.batch_size=(\d+)", c) for _, c in COMMANDS if "RepOpt-VGG-B1" in c]
    assert [int(size[1]) for size in sizes if size] == [512] * 2
    mesh = make_mesh(devices=[jax.devices()[0]] * 16)
    assert samples_per_group(512, 1, config.target.bn_group, mesh) == 32
    assert samples_per_group(config.search.batch_size, 1, None, mesh) >= SMALLEST_SHARE


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_python_in_documents_runs(document):
    """The blocks of a document one after the other, as a reader would type them."""
    names = {"__name__": "document"}
    for code in re.findall(r"```python\n(.*?)```", document.read_text(), re.DOTALL):
        exec(code, names)
    if document.name == "README.md":  # one step is done, and its loss is a number
        assert np.isfinite(names["loss"])
        assert int(names["optimizer"].step[...]) == 1


def test_links_lead_somewhere():
    for document in DOCUMENTS:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", document.read_text()):
            assert (document.parent / target).exists(), (document.name, target)


def test_files_that_documents_name_are_there():
    """A path, or a script of benchmarks/ by its name alone."""
    for document in (*DOCUMENTS, REPOSITORY / "CONTRIBUTING.md", REPOSITORY / "CHANGELOG.md"):
        for name in re.findall(r"`(?:python )?([\w/]+\.py)\b", document.read_text()):
            places = (REPOSITORY, REPOSITORY / "benchmarks", REPOSITORY / "repopt_jax")
            assert any((place / name).exists() for place in places), (document.name, name)


def test_every_document_is_linked_from_the_readme():
    readme, *others = DOCUMENTS
    text = readme.read_text()
    assert [d.name for d in others if f"(docs/{d.name})" not in text] == []


def test_tables_are_those_of_their_files():
    """On both pages; each table that can be made stands on the page of results."""
    for page in write_tables.PAGES:
        assert write_tables.rendered(page.read_text()) == page.read_text(), page.name
    readme, results = (page.read_text() for page in write_tables.PAGES)
    assert re.findall(r"<!-- (?!end)(.*) -->", readme) == ["summary"]
    assert set(re.findall(r"<!-- (\w+)\.json -->", results)) == result_tables.TABLES.keys()
