"""Claims about augmentation on the device: its images are the host's."""

import re

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_run import small_config
from test_data_randaugment import MOVES, covered, random_image

from repopt_jax.data import load_dataset, train_batches
from repopt_jax.data import randaugment as host
from repopt_jax.data.randaugment import NAMES, OPERATIONS, Draw, draw_jitter, packed
from repopt_jax.training import randaugment
from repopt_jax.training.devices import make_mesh, put_batch
from repopt_jax.training.parts import prepare
from repopt_jax.training.randaugment import apply_operations
from repopt_jax.training.step import jitted_train_step

pytestmark = pytest.mark.slow

SIZE = 40
COUNT = 120  # images in a batch, so that one program serves all tests
ON_DEVICE = jax.jit(apply_operations, static_argnums=2)
# Older versions round places to 1/32 of a pixel, of images whose neighbours differ by 200.
LARGEST_DIFFERENCE = 1 if int(cv2.__version__.split(".")[0]) >= 5 else 8


@pytest.fixture(scope="module")
def images():
    return np.stack([random_image(seed, SIZE, SIZE) for seed in range(COUNT)])


def both(images, drawn, mesh=None):
    """What the device and the host make of images and their operations."""
    operations = np.stack([packed(own, images.shape[1]) for own in drawn])
    on_device = np.asarray(ON_DEVICE(images, operations, mesh))
    on_host = [host.apply_operations(*pair) for pair in zip(images, drawn, strict=True)]
    assert on_device.dtype == np.uint8
    return on_device, np.stack(on_host)


def every_draw(name):
    """All magnitudes, signs and interpolations of one operation, then one that changes nothing."""
    draws = [
        (name, Draw(magnitude, negative, bicubic, (0.07 * magnitude, 1 - 0.06 * magnitude)))
        for magnitude in range(15)
        for negative in (False, True)
        for bicubic in (False, True)
    ]
    rest = [("Color", Draw(factor=1.0))] * (COUNT - len(draws))
    return [[draw, ("Color", Draw(factor=1.0))] for draw in draws + rest]


@pytest.mark.parametrize("name", [name for name in NAMES if name not in MOVES])
def test_looked_up_blended_and_painted_images_have_the_hosts_bits(name, images):
    on_device, on_host = both(images, every_draw(name))
    np.testing.assert_array_equal(on_device, on_host)
    assert (on_host[:60] != images[:60]).any()


@pytest.mark.parametrize("name", MOVES)
def test_moved_values_differ_from_the_hosts_by_rounding_only(name, images):
    on_device, on_host = both(images, every_draw(name))
    difference = np.abs(on_device.astype(int) - on_host)
    assert difference.max() <= LARGEST_DIFFERENCE
    assert LARGEST_DIFFERENCE > 1 or (difference > 0).mean() < 0.002
    np.testing.assert_array_equal(on_device[60:], images[60:])


def test_operations_give_what_the_official_code_gives(golden):
    """An image that is not square; tables bit for bit, moved pixels within the host's bounds."""
    data = np.load(golden / "randaug.npz")
    names = [key for key in data if key[-1] in "+-"]
    keys = [key.split("_") for key in names]
    draws = [[(name, Draw(int(magnitude), sign == "-"))] for name, magnitude, sign in keys]
    image = data["input"]
    operations = np.stack([packed(own, 80) for own in draws])
    found = np.asarray(ON_DEVICE(np.stack([image] * len(keys)), operations, None))
    assert len(keys) == 118
    for (name, *_), ((_, draw),), ours, full in zip(keys, draws, found, names, strict=True):
        if name not in MOVES:
            np.testing.assert_array_equal(ours, data[full], err_msg=full)
            continue
        inside = covered(name, image, draw)
        assert np.abs(ours.astype(int) - data[full])[inside].mean() <= 1
        grey, official_grey = ((x == 128).all(axis=-1) for x in (ours, data[full]))
        assert (grey != official_grey).mean() < 0.03


@pytest.mark.parametrize("values", [[7], [0, 255], [3, 250], [9, 10], range(256)])
@pytest.mark.parametrize("name", ["AutoContrast", "Equalize"])
def test_images_of_few_values_have_the_hosts_bits(name, values):
    chosen = np.random.default_rng(0).choice(np.array(values), (COUNT, SIZE, SIZE, 3))
    drawn = [[(name, Draw(5)), ("Equalize", Draw())]] * COUNT
    on_device, on_host = both(chosen.astype(np.uint8), drawn)
    np.testing.assert_array_equal(on_device, on_host)


def test_stretching_truncates_as_pillow_does_for_every_pair_of_values():
    """In one of 700 cases float64 ends below the whole number that is meant."""
    low, high = np.triu_indices(256, 1)
    low, high = (np.repeat(x[::7, None], 3, axis=1).astype(np.uint8) for x in (low, high))
    found = np.asarray(jax.jit(randaugment._stretch_tables)(low, high))[:, :, 0]
    expected = [host.stretched(*map(int, pair)) for pair in zip(low[:, 0], high[:, 0], strict=True)]
    np.testing.assert_array_equal(found, expected)


def test_colour_jitter_has_the_hosts_bits(images):
    """Factors that are no magnitude's, in any order."""
    rng = np.random.default_rng(1)
    on_device, on_host = both(images, [draw_jitter(rng, 0.9) for _ in images])
    np.testing.assert_array_equal(on_device, on_host)
    assert (on_device != images).mean() > 0.5


def test_a_fused_product_and_sum_would_round_a_blend_as_two_do():
    """GPUs have such an operation: both products of a blend are exact, so it changes nothing."""
    factors = np.random.default_rng(0).uniform(0.1, 2.7, 500).astype(np.float32)
    coarse = np.asarray(randaugment._coarse(jnp.asarray(factors)))
    for half in (coarse, factors - coarse):
        products = np.arange(-255, 256)[:, None] * half.astype(np.float64)
        np.testing.assert_array_equal(products.astype(np.float32), products)


def test_two_operations_follow_one_another(images):
    drawn = [[("Invert", Draw()), ("Solarize", Draw(6))]] * COUNT
    on_device, on_host = both(images, drawn)
    np.testing.assert_array_equal(on_device, on_host)
    swapped, _ = both(images, [own[::-1] for own in drawn])
    assert (swapped != on_device).any()


def test_eight_devices_make_the_images_of_one_and_exchange_none(images):
    """With as many chosen images on each device as there happen to be."""
    rng = np.random.default_rng(2)
    drawn = [host.draw_rand_augment(rng) for _ in images]
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), (jax.sharding.AxisType.Auto,) * 2)
    split = jax.NamedSharding(mesh, jax.P(("data", "fsdp")))
    operations = np.stack([packed(own, SIZE) for own in drawn])
    spread = jax.device_put((images, operations), split)
    text = ON_DEVICE.lower(*spread, mesh).compile().as_text()
    assert not re.search("all-gather|all-reduce|all-to-all|permute", text)
    found = ON_DEVICE(*spread, mesh)
    assert found.sharding.is_equivalent_to(split, 4)
    np.testing.assert_array_equal(found, ON_DEVICE(images, operations, None))


@pytest.mark.parametrize("batch", [1, 13, 16])
def test_work_is_done_for_chosen_rows_only(batch):
    """Whatever their number; a few rows at a time, none of them twice."""
    seen = []

    def double(x):
        jax.debug.callback(lambda rows: seen.append(len(rows)), x)
        return 2 * x

    values = jnp.arange(1, batch + 1)
    for count in {0, 1, batch // 2, batch}:
        chosen = np.isin(values, np.random.default_rng(count).permutation(values)[:count])
        seen.clear()
        found = randaugment._for_chosen(jnp.asarray(chosen), double, -values, values)
        jax.effects_barrier()
        np.testing.assert_array_equal(found, np.where(chosen, 2 * values, -values))
        size = -(-batch // 8)
        assert seen == [size] * -(-count // size)


def test_every_operation_belongs_to_one_family(images):
    """The others leave its images alone."""
    names = ("look_up", "blend", "cut_out", "move")
    families = [getattr(randaugment, name) for name in names]
    draws = [[(name, Draw(7))] for name in OPERATIONS]
    rows = np.stack([packed(own, SIZE) for own in draws])[:, 0]
    each = randaugment.Operation.of(rows)
    changed = [np.asarray(jax.jit(f)(images[:16], each)) != images[:16] for f in families]
    assert (sum(c.any((1, 2, 3)) for c in changed) == 1).all()


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_for_the_device_are_those_of_the_host(workers):
    """But for the operations, which they bring along; resuming is exact."""
    dataset = load_dataset("digits")
    arguments = {"batch_size": 16, "seed": 3, "augment": "jitter", "image_size": 12}
    on_host = train_batches(dataset, threads=0, **arguments)
    on_device = train_batches(dataset, augment_on="device", workers=workers, **arguments)
    for step in range(4):
        if step == 2:
            on_device = train_batches(dataset, augment_on="device", threads=0, **arguments)
            on_device.set_state(on_host.get_state())
        expected, found = next(on_host), next(on_device)
        assert (expected["image"] != found["image"]).any()
        found["image"] = np.asarray(ON_DEVICE(found["image"], found.pop("operations"), None))
        for key in expected:
            np.testing.assert_array_equal(found[key], expected[key])


@pytest.mark.parametrize("augment", ["weak", "crop"])
def test_batches_without_operations_are_for_the_device_as_for_the_host(augment):
    dataset = load_dataset("digits")
    places = (
        next(train_batches(dataset, batch_size=4, seed=0, augment=augment, augment_on=place))
        for place in ("host", "device")
    )
    expected, found = places
    assert expected.keys() == found.keys()
    np.testing.assert_array_equal(found["image"], expected["image"])


def test_a_place_that_there_is_not_is_refused():
    with pytest.raises(ValueError, match="augment_on must be 'host' or 'device', got 'gpu'"):
        train_batches(load_dataset("digits"), batch_size=4, seed=0, augment_on="gpu")


def part_on(place):
    """Training on eight devices, in two parts of a batch, with jitter."""
    section = {"batch_size": 64, "accumulation": 2, "bn_group": 4}
    changes = {f"target__{key}": value for key, value in section.items()}
    data = {"augment": "jitter", "augment_on": place}
    changes |= {f"target__data__{key}": value for key, value in data.items()}
    return prepare(small_config(**changes), "plain", make_mesh())


def test_steps_with_operations_on_the_device_end_with_the_bits_of_the_hosts():
    ends = {}
    for place in ("host", "device"):
        part = part_on(place)
        state, batches = part.init(), part.train_batches()
        for _ in range(2):
            batch = put_batch(part.mesh, next(batches))
            assert ("operations" in batch) == (place == "device")
            step = (part.graphdef, part.tx, part.options)
            state, metrics = jitted_train_step(*step, state, batch)
        ends[place] = jax.device_get((state, metrics))
    for expected, found in zip(*map(jax.tree.leaves, ends.values()), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_the_processor_leaves_operations_to_the_host():
    """Where the configuration has no other wish."""
    assert "operations" not in next(part_on("auto").train_batches())
