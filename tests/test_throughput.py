"""`throughput` times the step of every part, and leaves no file."""

import pytest
from small_run import small_config

from repopt_jax.training import run


@pytest.mark.slow
def test_throughput_prints_a_table_of_the_parts(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "TIMED_STEPS", 3)
    found = run.throughput(small_config(parts=("plain",)))
    assert list(found) == ["plain"] and found["plain"] > 0
    header, _, row = capsys.readouterr().out.splitlines()
    assert header.split("  ")[0] == "part" and header.endswith("images/s")
    assert row.startswith("plain optimizer  ") and row.endswith(f"{found['plain']:,.0f}")
    assert list(tmp_path.iterdir()) == []
