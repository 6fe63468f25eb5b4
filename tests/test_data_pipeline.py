"""Claims about batches: order, sharding, determinism, resuming."""

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest

from repopt_jax.data import Dataset, eval_batches, load_dataset, steps_per_epoch, train_batches
from repopt_jax.data.sources import ArraySource


def numbered(n=23, n_eval=10):
    """A set whose image i is filled with i and labelled i."""

    def source(n):
        images = np.arange(n, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), np.uint8)
        return ArraySource(images, np.arange(n))

    return Dataset("numbered", n, source(n), source(n_eval), (4, 4, 3))


def labels_of(batches, steps):
    return [next(batches)["label"].tolist() for _ in range(steps)]


def test_epochs_have_their_own_order_and_drop_the_remainder():
    data = numbered()
    steps = steps_per_epoch(data, 5)
    assert steps == 4
    batches = train_batches(data, batch_size=5, seed=1, num_epochs=2)
    first, second = labels_of(batches, steps), labels_of(batches, steps)
    for epoch in (first, second):
        assert len({label for batch in epoch for label in batch}) == 20
    assert first != second
    with pytest.raises(StopIteration):
        next(batches)


def test_the_seed_decides_the_order():
    def order(seed):
        return labels_of(train_batches(numbered(), batch_size=5, seed=seed), 4)

    assert order(0) == order(0) != order(1)


def test_images_belong_to_their_labels():
    batch = next(train_batches(numbered(), batch_size=5, seed=0))
    assert batch["image"].dtype == np.uint8 and batch["label"].dtype == np.int32
    np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], batch["label"])


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_batches_do_not_depend_on_threads(threads):
    digits = load_dataset("digits")
    arguments = {"batch_size": 100, "seed": 5, "augment": "flip_crop"}
    ours = train_batches(digits, threads=threads, **arguments)
    alone = train_batches(digits, threads=0, **arguments)
    for _ in range(30):
        np.testing.assert_array_equal(next(ours)["image"], next(alone)["image"])


@pytest.mark.parametrize("augment", ["none", "flip_crop"])
def test_processes_together_see_the_batches_of_one(augment):
    digits = load_dataset("digits")
    arguments = {"batch_size": 12, "seed": 5, "augment": augment}
    parts = [train_batches(digits, process_index=i, process_count=3, **arguments) for i in range(3)]
    whole = train_batches(digits, **arguments)
    for _ in range(3):
        batch = next(whole)
        together = [next(part) for part in parts]
        for key in batch:
            np.testing.assert_array_equal(batch[key], np.concatenate([b[key] for b in together]))


def test_a_restored_iterator_continues_exactly(tmp_path):
    """Orbax saves the Grain iterator after 7 steps; a fresh one continues from there."""
    digits = load_dataset("digits")

    def fresh():
        return train_batches(digits, batch_size=400, seed=5, augment="crop")

    batches = fresh()
    for _ in range(7):  # two and a third epochs
        next(batches)
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(7, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(batches)))
        manager.wait_until_finished()
        resumed = fresh()
        manager.restore(
            7, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(resumed))
        )
    for _ in range(5):
        np.testing.assert_array_equal(next(batches)["image"], next(resumed)["image"])


@pytest.mark.parametrize("count", [1, 2, 4])
def test_evaluation_sees_every_image_once_and_all_processes_as_many_batches(count):
    """10 images in batches of 4: the last batch leaves processes 2 and 3 of 4 without any."""
    seen, numbers = [], set()
    for index in range(count):
        batches = list(
            eval_batches(numbered(), batch_size=4, process_index=index, process_count=count)
        )
        numbers.add(len(batches))
        for batch in batches:
            assert batch["image"].shape == (4 // count, 4, 4, 3)
            assert batch["mask"].dtype == bool
            seen += batch["label"][batch["mask"]].tolist()
            assert not batch["image"][~batch["mask"]].any()
    assert sorted(seen) == list(range(10))
    assert numbers == {3}


@pytest.mark.parametrize("index", [0, 1])
def test_places_of_evaluation_images_lie_in_the_set(index):
    """A device would read beyond it where they did not."""
    arguments = {"batch_size": 8, "process_index": index, "process_count": 2}
    images = eval_batches(numbered(), **arguments)
    places = eval_batches(numbered(), images=False, **arguments)
    for batch, found in zip(images, places, strict=True):
        np.testing.assert_array_equal(found["mask"], batch["mask"])
        assert found["index"].max() < 10
        assert found["index"][found["mask"]].tolist() == batch["label"][batch["mask"]].tolist()


def test_evaluation_can_be_repeated():
    batches = eval_batches(numbered(), batch_size=4)
    first, second = ([b["label"].tolist() for b in batches] for _ in range(2))
    assert first == second


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 24}, r"batch_size must be in 1\.\.23.*got 24"),
        ({"batch_size": 0}, r"batch_size must be in 1\.\.23.*got 0"),
        ({"seed": -1}, "seed must be .* got -1"),
        ({"num_epochs": 0}, "num_epochs must be .* got 0"),
        ({"augment": "flop"}, "augment must be one of none, crop, .* got 'flop'"),
        ({"process_count": 2}, "batch_size must be a multiple of process_count = 2, got 5"),
        ({"process_index": 1}, "process_index must be in .* got 1"),
        ({"threads": -1}, "threads must be None or at least 0, got -1"),
    ],
)
def test_wrong_arguments_are_named(change, message):
    arguments = {"batch_size": 5, "seed": 0} | change
    with pytest.raises(ValueError, match=message):
        train_batches(numbered(), **arguments)
