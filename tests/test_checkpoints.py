"""Saving and restoring: exact, onto other devices, and past damaged or unfinished checkpoints."""

import dataclasses
import json
import os
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from repopt_jax.training.checkpoints import Checkpoints
from repopt_jax.training.manifests import unseal
from repopt_jax.tree_paths import by_path

ROWS = P("data")


class Momentum(NamedTuple):
    count: jax.Array
    trace: dict
    nothing: None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    params: nnx.State
    opt_state: tuple
    extra: dict


def sharding(devices=8, spec=ROWS):
    mesh = jax.make_mesh((devices,), ("data",), devices=jax.devices()[:devices])
    return NamedSharding(mesh, spec)


def bits(tree):
    """Every number's bits, so that NaN equals NaN and -0.0 differs from 0.0."""
    plain = jax.tree.map(
        lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x,
        tree,
    )
    return jax.tree.map(lambda x: (str(x.dtype), x.shape, np.asarray(x).tobytes()), plain)


def everything(devices=8):
    """A state with every kind of node and number."""
    draw = np.random.default_rng(0).normal
    odd = np.array([np.nan, -0.0, np.inf, 1e-45, 1.5, -2, 3, 4], np.float32)
    odd[0:1].view(np.uint32)[:] += 7  # a NaN with a payload
    rows, whole = sharding(devices), sharding(devices, P())
    extra = {
        "odd": jax.device_put(odd, rows),
        "half": jax.device_put(jnp.asarray(draw(size=(16, 3)), jnp.bfloat16), rows),
        "bytes": jax.device_put(np.arange(24, dtype=np.uint8).reshape(8, 3), rows),
        "flags": jax.device_put(np.array([True, False, True]), whole),
        "wave": jax.device_put(np.array([1 + 2j, 3j], np.complex64), whole),
        "rng": jax.device_put(jax.random.key(3), whole),
        "a.b/c d": {"x": jax.device_put(np.int32(-5), whole)},
    }
    trace = {"kernel": jax.device_put(draw(size=(8, 64)).astype(np.float32), rows)}
    params = jax.device_put(nnx.state(nnx.Linear(3, 16, rngs=nnx.Rngs(0))), whole)
    momentum = Momentum(jax.device_put(np.int32(9), whole), trace)
    return TrainState(params, (optax.EmptyState(), momentum), extra)


def numbers(seed, size=2000):
    return {"w": jnp.asarray(np.random.default_rng(seed).normal(size=size), jnp.float32)}


def two_saved(workdir):
    checkpoints = Checkpoints(workdir)
    for step in (1, 2):
        checkpoints.save(step, numbers(step), metrics={"top1": step / 10})
    checkpoints.close()


def test_restored_state_is_bit_exact_in_every_kind_of_node_and_number(tmp_path):
    state = everything()
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.restore(state) is None
    checkpoints.save(7, state)
    step, restored = checkpoints.restore(state)
    checkpoints.close()
    assert step == 7
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert bits(restored) == bits(state)
    assert jax.tree.map(lambda x: x.sharding, restored) == jax.tree.map(lambda x: x.sharding, state)


def test_random_keys_continue_their_stream(tmp_path):
    state = {"a": jax.random.key(3), "b": jax.random.split(jax.random.key(4, impl="rbg"), 2)}
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state)
    _, restored = checkpoints.restore(jax.eval_shape(lambda: state))
    checkpoints.close()
    for name in state:
        assert restored[name].dtype == state[name].dtype
    assert jax.random.normal(restored["a"]) == jax.random.normal(state["a"])


def test_state_moves_from_8_devices_to_4_to_1_and_back_to_8(tmp_path):
    original = everything(8)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, original)
    for step, devices in [(1, 4), (2, 1), (3, 8)]:
        example = everything(devices)
        _, state = checkpoints.restore(jax.tree.map(jnp.zeros_like, example), step=step)
        assert bits(state) == bits(original)
        assert state.extra["odd"].sharding == example.extra["odd"].sharding
        assert len(state.extra["odd"].sharding.device_set) == devices
        checkpoints.save(step + 1, state)
    checkpoints.close()


def test_abstract_example_says_the_sharding_and_an_uncommitted_array_stays_so(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"w": jnp.arange(8.0), "n": jnp.int32(1)})
    example = {
        "w": jax.ShapeDtypeStruct((8,), jnp.float32, sharding=sharding()),
        "n": jnp.int32(0),
    }
    _, restored = checkpoints.restore(example)
    checkpoints.close()
    assert restored["w"].sharding == sharding()
    assert not restored["n"].committed
    jax.jit(lambda s: s["w"] * s["n"].astype(jnp.float32))(restored)  # runs on eight devices


def test_without_an_example_everything_is_read_by_its_path(tmp_path):
    state = everything()
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state)
    step, found = checkpoints.restore()
    checkpoints.close()
    assert step == 1
    assert bits(found) == bits(by_path(state))
    assert all(len(array.devices()) == 1 for array in found.values())


def test_state_may_be_donated_right_after_an_asynchronous_save(tmp_path):
    state = {"w": jax.device_put(np.arange(1 << 16, dtype=np.float32), sharding())}
    wanted = bits(state)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state)
    overwrite = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
    state = jax.block_until_ready(overwrite(state))
    _, restored = checkpoints.restore(state)
    checkpoints.close()
    assert bits(restored) == wanted


def test_latest_and_best_are_kept_and_found_again_by_another_process(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_latest=2)
    for step, top1 in enumerate([0.1, 0.9, float("nan"), 0.9, 0.5, None, 0.3], start=1):
        checkpoints.save(step, numbers(step), metrics=None if top1 is None else {"top1": top1})
    checkpoints.close()
    assert checkpoints.steps() == [2, 6, 7]
    reader = Checkpoints(tmp_path, read_only=True)
    assert reader.best_step() == 2
    step, restored = reader.restore(numbers(0), step="best")
    reader.close()
    assert (step, bits(restored)) == (2, bits(numbers(2)))


def test_metrics_that_come_later_are_written_by_what_waits_for_the_checkpoint(tmp_path):
    """They count at once, but an evaluation does not wait for a file."""
    checkpoints = Checkpoints(tmp_path, keep_latest=1)
    for step, top1 in enumerate([0.5, 0.9, 0.1], start=1):
        checkpoints.save(step, numbers(step))
        checkpoints.add_metrics(step, {"top1": top1})
    assert checkpoints.best_step() == 2
    checkpoints.close()
    manifests = tmp_path.glob("checkpoints/*/manifest/metadata")
    assert {p.parts[-3]: unseal(json.loads(p.read_text()))["metrics"] for p in manifests} == {
        "2": {"top1": 0.9},
        "3": {"top1": 0.1},
    }


def test_metrics_are_added_to_those_that_could_not_be_read_at_first(tmp_path):
    two_saved(tmp_path)
    file = tmp_path / "checkpoints" / "2" / "manifest" / "metadata"
    whole = file.read_bytes()
    file.write_bytes(b"")
    checkpoints = Checkpoints(tmp_path)
    file.write_bytes(whole)
    checkpoints.restore(numbers(0))
    checkpoints.add_metrics(2, {"top5": 0.7})
    checkpoints.close()
    assert unseal(json.loads(file.read_text()))["metrics"] == {"top1": 0.2, "top5": 0.7}


def test_going_back_to_an_older_checkpoint_gives_up_the_newer_ones_once_one_is_complete(tmp_path):
    first = Checkpoints(tmp_path, keep_latest=9)
    for step in (1, 3, 5):
        first.save(step, numbers(step), metrics={"top1": step / 10})
    first.close()
    checkpoints = Checkpoints(tmp_path, keep_latest=9)
    checkpoints.restore(numbers(0), step=1)
    assert checkpoints.steps() == [1, 3, 5]
    checkpoints.save(3, numbers(33), metrics={"top1": 0.05})
    checkpoints.wait()
    assert checkpoints.steps() == [1, 3]
    assert bits(checkpoints.restore(numbers(0))[1]) == bits(numbers(33))
    assert checkpoints.best_step() == 1
    checkpoints.close()


@pytest.mark.parametrize("step", [1, 2])
def test_checkpoints_of_another_run_are_not_overwritten(tmp_path, step):
    two_saved(tmp_path)
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(ValueError, match=rf"step .* above 2.* got {step}"):
        checkpoints.save(step, numbers(0))
    checkpoints.close()
    assert checkpoints.steps() == [1, 2]


def test_a_second_save_of_the_same_step_writes_nothing(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, numbers(1))
    checkpoints.save(1, numbers(2))
    assert bits(checkpoints.restore(numbers(0))[1]) == bits(numbers(1))
    checkpoints.close()


def test_reader_changes_no_file_and_needs_none(tmp_path):
    reader = Checkpoints(tmp_path / "absent", read_only=True)
    assert reader.restore(numbers(0)) is None
    with pytest.raises(ValueError, match=r"read_only .* got True"):
        reader.save(1, numbers(0))
    reader.close()
    assert not (tmp_path / "absent").exists()

    two_saved(tmp_path)
    (tmp_path / "checkpoints" / "3.orbax-checkpoint-tmp-1").mkdir()  # a save in progress elsewhere
    before = {p: os.stat(p).st_mtime_ns for p in tmp_path.rglob("*")}
    reader = Checkpoints(tmp_path, read_only=True)
    assert reader.restore(numbers(0))[0] == 2
    reader.close()
    assert {p: os.stat(p).st_mtime_ns for p in tmp_path.rglob("*")} == before


def test_state_of_another_tree_is_refused_naming_the_paths(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"a": {"b": jnp.ones(2)}, "c": jnp.ones(3), "d": jnp.ones(1)})
    wanted = {"a": {"x": jnp.ones(2)}, "c": jnp.ones(4), "d": jnp.ones(1, jnp.bfloat16)}
    with pytest.raises(ValueError) as error:
        checkpoints.restore(wanted)
    checkpoints.close()
    told = str(error.value)
    assert f"{tmp_path}/checkpoints/1" in told
    missing, surplus, other = (part.split(": ")[1] for part in told.split("; ")[1:])
    assert (missing, surplus) == ("a/x", "a/b")
    assert other == (
        "c (float32[3] saved, float32[4] wanted), d (float32[1] saved, bfloat16[1] wanted)"
    )


def test_wrong_arguments_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"keep_latest .* at least 1, got 0"):
        Checkpoints(tmp_path, keep_latest=0)
    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(ValueError, match=r"state .* jax.Array .* got <class 'int'> at opt/0"):
        checkpoints.save(1, {"opt": (3,)})
    checkpoints.save(5, numbers(0))
    with pytest.raises(ValueError, match=r"step .* 5.* got 4"):
        checkpoints.save(4, numbers(0))
    with pytest.raises(ValueError, match=r"step must be one of \[5\] in .*, got 6"):
        checkpoints.restore(numbers(0), step=6)
    with pytest.raises(ValueError, match=r"step .*best.* 'top1'"):
        checkpoints.restore(numbers(0), step="best")
    checkpoints.close()


def test_paths_of_an_earlier_version_are_read_as_todays(tmp_path):
    """RepOpt-GhostNet's stages were once called blocks, and paths ended in nnx's "/value"."""

    def named(stages, end):
        path = f"{stages}/0/0/ghost1/cheap_conv/conv/kernel{end}"
        return {f"params/{path}": jnp.arange(3.0), f"opt_state/0/trace/{path}": jnp.ones(2)}

    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, named("blocks", "/value"))
    kernel = {"kernel": nnx.Param(jnp.zeros(3))}
    block = {"ghost1": {"cheap_conv": {"conv": kernel}}}
    trace = jax.tree.map(lambda x: jnp.zeros(2), block)
    wanted = {
        "params": {"stages": [[block]]},
        "opt_state": [{"trace": {"stages": [[trace]]}}],
    }
    _, restored = checkpoints.restore(wanted)
    assert by_path(restored).keys() == named("stages", "").keys()
    for path, array in named("stages", "").items():
        np.testing.assert_array_equal(by_path(restored)[path], array)
    _, found = checkpoints.restore()
    assert found.keys() == named("stages", "").keys()
    checkpoints.close()
