"""A part is what its configuration says."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from small_run import small_config

from repopt_jax import data
from repopt_jax.models import searched_scales
from repopt_jax.scales import Scales
from repopt_jax.training.devices import make_mesh
from repopt_jax.training.networks import initial_scales
from repopt_jax.training.parts import prepare, prepare_parts


def part_of(name, scales=None, **changes):
    config = small_config(**changes)
    scales = initial_scales(config) if scales is None else scales
    return prepare(config, name, make_mesh(devices=jax.devices()[:1]), scales)


def drawn_scales():
    rng = np.random.default_rng(0)
    blocks = initial_scales(small_config()).vectors.items()
    draw = {p: {n: rng.normal(size=v.shape).astype("f") for n, v in b.items()} for p, b in blocks}
    return Scales(draw)


@pytest.mark.parametrize("name", ["search", "target", "plain", "csla", "repvgg"])
def test_bfloat16_is_the_type_of_the_computation_alone(name):
    part = part_of(name, dtype="bfloat16")
    assert part.options.dtype == jnp.bfloat16
    state = jax.eval_shape(part.init)
    images = jnp.zeros((part.section.batch_size, 8, 8, 3), jnp.bfloat16)
    assert {x.dtype for x in jax.tree.leaves(state)} <= {jnp.dtype("float32"), jnp.dtype("int32")}
    logits = jax.eval_shape(
        lambda *state: nnx.merge(part.graphdef, *state, copy=True)(images),
        state.params,
        state.stats,
    )
    assert logits.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("epochs", "steps"), [(1.0, 11), (2.5, 28), (0.01, 1)], ids=["whole", "fraction", "least"]
)
def test_lengths_are_in_epochs_of_full_batches(epochs, steps):
    """1437 images are 11 batches of 128."""
    part = part_of("plain", target__epochs=epochs, target__schedule__warmup_epochs=0.0)
    assert (part.steps_per_epoch, part.steps, part.steps_in(epochs)) == (11, steps, steps)


def test_averages_are_kept_where_they_are_wanted():
    assert jax.eval_shape(part_of("search").init).ema is None
    params, stats = jax.eval_shape(part_of("target").init).ema
    state = jax.eval_shape(part_of("target").init)
    assert jax.tree.structure((params, stats)) == jax.tree.structure((state.params, state.stats))


@pytest.mark.parametrize("identity", ["searched", "one"])
def test_csla_starts_from_the_scales_as_the_target_does(identity):
    scales = drawn_scales()
    found = searched_scales(part_of("csla", scales, identity=identity).build())
    for path, block in scales.vectors.items():
        for name, vector in block.items():
            ones = name == "identity" and identity == "one"
            np.testing.assert_array_equal(
                found[path][name], np.ones_like(vector) if ones else vector
            )


def test_only_the_target_has_multipliers():
    """One vector for every scaled branch of every block, in the optimizer's state."""
    scales = drawn_scales()
    state = jax.eval_shape(part_of("target", scales).init)
    scaled = [n for block in scales.vectors.values() for n in block if n != "identity"]
    assert len(jax.tree.leaves(state.opt_state[0])) == len(scaled) == 10
    assert jax.tree.leaves(jax.eval_shape(part_of("plain").init).opt_state[0]) == []


def test_the_target_and_the_plain_network_start_apart_and_draw_by_the_seed():
    scales = drawn_scales()

    def kernel(name, **changes):
        return part_of(name, scales, **changes).build().stage4[0].conv.kernel[...]

    same = kernel("target")
    np.testing.assert_array_equal(same, kernel("target"))
    assert not np.allclose(same, kernel("target", seed=1))
    assert not np.allclose(same, kernel("plain"))


def test_seeds_share_a_program_where_nothing_is_drawn_on_the_device():
    def seed(**changes):
        return prepare(small_config(seed=7, **changes), "plain", make_mesh()).options.seed

    assert seed() == 0
    assert seed(target__random_erasing=0.1) == seed(target__mix__mixup=0.1) == 7


@pytest.mark.parametrize(("devices", "eval_batch_size"), [(1, 50), (8, 56)])
def test_every_field_of_the_images_reaches_the_batches(monkeypatch, devices, eval_batch_size):
    """An evaluation batch is a multiple of the devices."""
    found = {}
    for name in ("train_batches", "eval_batches"):
        monkeypatch.setattr(data, name, lambda _, name=name, **given: found.update({name: given}))
    fields = {"fast": True, "augment": "raug15", "augment_on": "device", "eval_resize": 9}
    reading = {"image_size": 8, "skip_bad": True, "threads": 3, "workers": 2}
    changes = {f"target__data__{key}": value for key, value in (fields | reading).items()}
    changes |= {"seed": 7, "target__batch_size": 64, "target__eval_batch_size": 50}
    prepare(small_config(**changes), "plain", make_mesh(devices=jax.devices()[:devices]))
    reading |= {"process_index": 0, "process_count": 1, "images": True}
    resize = fields.pop("eval_resize")
    assert found["train_batches"] == reading | fields | {"batch_size": 64, "seed": 7}
    assert found["eval_batches"] == reading | {"batch_size": eval_batch_size, "resize": resize}


@pytest.mark.parametrize(
    ("choice", "platform", "expected"),
    [
        ("auto", "cpu", "host"),
        ("auto", "gpu", "device"),
        ("host", "gpu", "host"),
        ("device", "cpu", "device"),
    ],
)
def test_where_operations_are_applied(monkeypatch, choice, platform, expected):
    part = part_of("plain", target__data__augment_on=choice)
    device = types.SimpleNamespace(platform=platform)
    part = dataclasses.replace(part, mesh=types.SimpleNamespace(devices=np.array([device])))
    monkeypatch.setattr(data, "train_batches", lambda _, **given: given["augment_on"])
    assert part.train_batches() == expected


def test_parts_with_the_same_images_count_their_own_bad_ones():
    config, names = small_config(parts=("target", "plain")), ("target", "plain")
    target, plain = prepare_parts(config, names, make_mesh(), initial_scales(config)).values()
    assert target.dataset.train is plain.dataset.train
    target.dataset.bad_images.add("training image 1")
    assert not plain.dataset.bad_images
