"""A run remembers the BatchNorm group that it began with, whatever devices it goes on with."""

import jax
import pytest
from small_run import small_config

from repopt_jax.training import run
from repopt_jax.training.devices import make_mesh
from repopt_jax.training.interruption import RunStopped


@pytest.fixture
def begin(tmp_path, monkeypatch):
    """Begins a run without a `bn_group` on so many devices, and returns the part to be trained."""

    def begin(devices, **changes):
        config = small_config(**{"parts": ("plain",), "target__bn_group": None} | changes)
        mesh = make_mesh(devices=jax.devices()[:devices])
        parts = []

        def train(part, workdir):
            parts.append(part)
            raise RunStopped("begun", 0)

        monkeypatch.setattr(run, "make_mesh", lambda fsdp: mesh)
        monkeypatch.setattr(run, "train", train)
        try:
            run.run(config, tmp_path)
        except RunStopped as stopped:
            if str(stopped) != "begun":
                raise
        return parts[0]

    return begin


def test_a_run_keeps_its_bn_group_on_fewer_devices(begin):
    """A device's share of 128 images is 16 on 8 devices, and would be 128 on one."""
    for devices in (8, 1):
        part = begin(devices)
        assert part.section.bn_group == part.options.group == 16


def test_a_part_may_follow_that_does_not_read_every_section(begin):
    """Such as "qat" after a search and a target: the search's groups are still what they were."""
    begin(8, parts=("search", "plain"), search__bn_group=None)
    for _ in range(2):  # the second sees what the first wrote
        begin(8, parts=("plain",), search__bn_group=None)
    assert begin(1, parts=("search",), search__bn_group=None).options.group == 16


def test_a_bn_group_that_devices_cannot_hold_is_told_with_its_origin(begin, tmp_path):
    begin(1)
    told = f"bn_group.*128.*{tmp_path}"
    with pytest.raises(RunStopped, match=told):
        begin(8)


def test_a_batch_that_no_run_has_is_not_blamed_on_the_one_before(begin):
    begin(1)
    with pytest.raises(RunStopped, match=r"batch_size .* got 0 and 1$"):
        begin(1, target__batch_size=0)


def test_a_large_machine_gives_no_tiny_groups_unless_they_are_asked_for(begin, tmp_path):
    """A share of 4 images on 8 devices is refused, before anything is written."""
    told = r"^target\.bn_group.*None"
    with pytest.raises(RunStopped, match=told):
        begin(8, target__batch_size=32)
    assert not list(tmp_path.iterdir())
    assert begin(8, target__batch_size=32, target__bn_group=4).options.group == 4
