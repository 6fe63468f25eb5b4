"""A checkpoint's position of the data: batches go on as if nothing had stopped them."""

import json

import grain
import jax.numpy as jnp
import numpy as np
import pytest

from repopt_jax.training import manifests
from repopt_jax.training.checkpoints import Checkpoints

STATE = {"w": jnp.arange(3.0)}


class Numbers:
    def __len__(self):
        return 50

    def __getitem__(self, index):
        return index

    def __repr__(self):
        return "Numbers()"


def grain_loader():
    sampler = grain.samplers.IndexSampler(50, shuffle=True, seed=0, num_epochs=None)
    return grain.DataLoader(data_source=Numbers(), sampler=sampler, worker_count=0)


def grain_dataset():
    return grain.MapDataset.range(50).shuffle(seed=2).repeat().batch(4).to_iter_dataset()


@pytest.mark.parametrize("make", [grain_loader, grain_dataset])
def test_data_goes_on_with_the_batches_an_undisturbed_run_would_see(tmp_path, make):
    iterator = iter(make())
    for _ in range(17):
        next(iterator)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(17, STATE, iterator)
    undisturbed = [np.asarray(next(iterator)) for _ in range(20)]
    resumed = iter(make())
    checkpoints.restore(STATE, resumed)
    checkpoints.close()
    np.testing.assert_array_equal([np.asarray(next(resumed)) for _ in range(20)], undisturbed)


def test_position_of_the_data_that_was_not_saved_is_refused(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, STATE)
    with pytest.raises(ValueError, match=r"data_iterator must be None.*no position"):
        checkpoints.restore(STATE, iter(grain_dataset()))
    checkpoints.close()


def test_a_position_that_all_processes_share_is_taken_up_by_any_number(tmp_path, monkeypatch):
    """Saved by two; positions that differ are of use to two processes only."""
    iterator = iter(grain_dataset())
    first = [next(iterator) for _ in range(3)]
    position = json.dumps(iterator.get_state())
    expected = next(iterator)
    iterator = iter(grain_dataset())
    apart = [position, json.dumps(iterator.get_state())]
    for step, positions in enumerate(([position] * 2, apart), 1):
        monkeypatch.setattr(manifests, "gathered", lambda _, found=positions: found)
        checkpoints = Checkpoints(tmp_path / str(step))
        checkpoints.save(step, STATE, iterator)
        if step == 1:
            checkpoints.restore(STATE, iterator)
            np.testing.assert_equal(next(iterator), expected)
            assert len(first) == 3
        else:
            with pytest.raises(ValueError, match=r"data_iterator must be None.* 2 processes"):
                checkpoints.restore(STATE, iterator)
        checkpoints.close()
