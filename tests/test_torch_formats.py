"""Every row of the table in docs/torch_files.md, with files that `torch_cases.py` builds."""

import pathlib
import re

import jax
import numpy as np
import pytest
import torch_cases

from repopt_jax.convert import main
from repopt_jax.files import load_network, load_weights
from repopt_jax.torch_files import export_weights

DOCUMENT = pathlib.Path(__file__).parents[1] / "docs" / "torch_files.md"
READ, REFUSED = list(torch_cases.read_cases()), list(torch_cases.refused_cases())


def rows():
    """First cell of every row of the table -> its second."""
    found = re.findall(r"^\| ([^|]+?) \| (read|refused|stand-in)", DOCUMENT.read_text(), re.M)
    return {re.sub(r"[`]", "", first): second for first, second in found}


def test_every_row_has_a_case_and_every_case_a_row():
    table = rows()
    assert {case.row for case in READ} == {row for row in table if table[row] == "read"}
    assert {case.row for case in REFUSED} == {row for row in table if table[row] == "refused"}


def names(cases):
    return [f"{index}-{case.row[:30]}" for index, case in enumerate(cases)]


@pytest.mark.parametrize("case", READ, ids=names(READ))
def test_files_are_read(case, tmp_path, capsys):
    source, target = tmp_path / "a", tmp_path / "b.safetensors"
    source.write_bytes(case.data)
    assert main([*case.flags, str(source), str(target)]) == 0
    said = capsys.readouterr().out
    assert re.search(case.says, said), said
    wanted = export_weights(torch_cases.network()) if case.wanted is None else case.wanted
    if wanted:
        with jax.enable_x64(True):
            model, arguments = load_network(target)
        found = export_weights(model)
        assert f"kind {arguments['kind']}" in said
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            same = np.asarray(found[name], np.float64) == np.asarray(value, np.float64)
            assert same.all() or name.endswith("num_batches_tracked"), name


@pytest.mark.parametrize("case", REFUSED, ids=names(REFUSED))
def test_files_are_refused_in_one_short_printable_line(case, tmp_path, capsys):
    source, target = tmp_path / "a", tmp_path / "b.safetensors"
    source.write_bytes(case.data)
    if case.load:
        with pytest.raises(ValueError) as error:
            load_weights(source)
        said = str(error.value)
    else:
        assert main([*case.flags, str(source), str(target)]) == case.status
        said = capsys.readouterr().err.removesuffix("\n")
    assert re.search(case.says, said), said
    assert said.isprintable() and len(said) < 1000
    assert list(tmp_path.iterdir()) == [source]


def test_strides_of_the_metadata_and_of_the_flag_are_kept(tmp_path):
    cases = [case for case in READ if case.row == "strides"]
    kept = []
    for index, case in enumerate(cases):
        source, target = tmp_path / "a", tmp_path / f"{index}.safetensors"
        source.write_bytes(case.data)
        main([*case.flags, str(source), str(target)])
        kept.append(load_network(target)[1].get("strides"))
    assert kept == [None, [1, 2, 1, 2, 2], [1, 2, 1, 2, 2]]
