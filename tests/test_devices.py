"""What devices there are changes where numbers live, and none of the numbers.

Operations, speed, memory and a profile are reported as they are.
"""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec
from small_run import small_config

from repopt_jax import create_model
from repopt_jax.scales import Scales
from repopt_jax.training import devices, inputs, loop, run
from repopt_jax.training.devices import (
    Profile,
    forward_flops,
    make_mesh,
    peak_flops,
    put_batch,
    samples_per_group,
    state_shardings,
)
from repopt_jax.training.parts import prepare
from repopt_jax.training.report import read_metrics
from repopt_jax.training.step import jitted_train_step

pytestmark = pytest.mark.slow

STEPS = 5
EVALUATED = ("top1", "top5", "loss")
CASES = {"one": (1, 1), "data": (8, 1), "fsdp": (8, 4)}


def scales_for(config, mesh):
    """Drawn scales, so that the multipliers matter."""
    rng = np.random.default_rng(0)
    initial = Scales.initial(nnx.eval_shape(prepare(config, "plain", mesh).build))
    draw = {
        path: {name: rng.normal(1, 0.5, v.shape).astype(np.float32) for name, v in block.items()}
        for path, block in initial.vectors.items()
    }
    return Scales(draw)


def compiled(count, fsdp, accumulation=2):
    """A target's part on `count` devices, its state and data, and the compiled step."""
    config = small_config(
        target__bn_group=4,
        dtype="float64",
        fsdp=fsdp,
        target__batch_size=64,
        target__accumulation=accumulation,
        target__schedule__warmup_epochs=0.0,
    )
    mesh = make_mesh(fsdp, jax.devices()[:count])
    part = prepare(config, "target", mesh, scales_for(config, mesh))
    state, batches = part.init(), part.train_batches()
    batch = put_batch(mesh, next(batches))
    step = jitted_train_step.lower(part.graphdef, part.tx, part.options, state, batch).compile()
    return part, state, batch, batches, step


def train(count, fsdp):
    """The part, its first parameters, and the state after some steps."""
    part, state, batch, batches, step = compiled(count, fsdp)
    start = [np.asarray(x) for x in jax.tree.leaves(state.params)]
    for _ in range(STEPS):
        state, _ = step(state, batch)
        batch = put_batch(part.mesh, next(batches))
    return part, start, state


@pytest.fixture(scope="module")
def trained():
    """The same training on one device and, in two ways, on eight."""
    with jax.enable_x64(True), pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "FSDP_MIN_SIZE", 8)  # a small network's arrays are small
        return {name: train(*case) for name, case in CASES.items()}


@pytest.mark.parametrize("case", ["data", "fsdp"])
def test_eight_devices_train_as_one(trained, case):
    """Every array of the state, in float64, after 5 steps of 2 accumulated parts."""
    _, start, alone = trained["one"]
    _, _, state = trained[case]
    for one, other in zip(jax.tree.leaves(alone), jax.tree.leaves(state), strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=0, atol=1e-12)
    for before, after in zip(start, jax.tree.leaves(alone.params), strict=True):
        assert abs(before - np.asarray(after)).max() > 1e-6


@pytest.mark.parametrize("case", CASES)
def test_a_step_leaves_the_state_where_state_shardings_puts_it(trained, case, monkeypatch):
    """Parameters, statistics, averages, momentum and multipliers: nothing is copied silently."""
    monkeypatch.setattr(devices, "FSDP_MIN_SIZE", 8)
    part, _, state = trained[case]
    wanted = state_shardings(part.mesh, state)
    pairs = zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True)
    assert all(x.sharding.is_equivalent_to(sharding, x.ndim) for x, sharding in pairs)


def test_fsdp_splits_kernels_momentum_averages_and_multipliers(trained):
    """Each device holds its share of the output channels of all of them."""
    _, fsdp = CASES["fsdp"]
    _, _, state = trained["fsdp"]
    paths = jax.tree_util.tree_leaves_with_path(state)
    split = {jax.tree_util.keystr(p): x for p, x in paths if not x.is_fully_replicated}
    for x in split.values():
        assert {s.data.shape[-1] for s in x.addressable_shards} == {x.shape[-1] // fsdp}
    kernels = [name for name in split if "'stage4'" in name and "'kernel'" in name]
    places = {name.split("[")[0] + name.split("]")[0][-3:] for name in kernels}
    assert len(places) >= 3, places  # parameters, trace of the momentum, averages
    assert any("scales['conv3x3']" in name for name in split)


@pytest.fixture(scope="module")
def told(optimized):  # a claim about what users compile
    """The state and the program of a step on eight devices, of a batch in one part."""
    with jax.enable_x64(True):
        _, state, _, _, step = compiled(8, 1, accumulation=1)
    return state, step.as_text()


def test_without_fsdp_devices_talk_at_the_end_of_a_step_only(told):
    """One sum of gradients, statistics and metrics: no image moves, BatchNorm asks nobody."""
    pattern = r" (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
    found = re.findall(pattern, told[1])
    assert set(found) == {"all-reduce"}
    assert len(found) <= 3  # XLA may split it; BatchNorm over the whole batch would need 21


def test_without_fsdp_what_devices_tell_each_other_is_the_size_of_the_parameters(told):
    """Gradients and BatchNorm's running values once, and two scalars."""
    state, program = told
    sums = re.findall(r"= \(?(.*?)\)? all-reduce(?:-start)?\(", program)
    shapes = re.findall(r"f64\[([\d,]*)\]", " ".join(sums))
    numbers = sum(math.prod(int(n) for n in shape.split(",") if n) for shape in shapes)
    own = sum(x.size for x in jax.tree.leaves((state.params, state.stats)))
    assert own <= numbers <= 1.05 * own


def test_a_batch_is_split_over_all_devices_in_order():
    mesh = make_mesh(2)
    batch = put_batch(mesh, {"label": np.arange(16, dtype=np.int32)})["label"]
    shards = sorted(batch.addressable_shards, key=lambda shard: shard.index[0].start)
    assert [shard.data.tolist() for shard in shards] == [[2 * i, 2 * i + 1] for i in range(8)]


def test_only_large_arrays_with_divisible_channels_are_split():
    mesh = make_mesh(4)
    shapes = {"large": (256, 256), "small": (4, 4), "odd": (512, 257), "step": ()}
    state = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    specs = {name: s.spec for name, s in state_shardings(mesh, state).items()}
    everywhere = PartitionSpec()
    assert specs == {
        "large": PartitionSpec(None, "fsdp"),
        "small": everywhere,
        "odd": everywhere,
        "step": everywhere,
    }
    replicated = state_shardings(make_mesh(), state)
    assert all(sharding.spec == everywhere for sharding in replicated.values())


@pytest.mark.parametrize("fsdp", [0, -1, 3, 16])
def test_a_mesh_needs_an_fsdp_that_divides_the_devices(fsdp):
    with pytest.raises(ValueError, match=rf"fsdp .* 8, got {fsdp}$"):
        make_mesh(fsdp)


class SliceDevice:
    """What a mesh asks of a device of one of several slices, such as a GPU of another host."""

    platform, device_kind, client = "gpu", "a GPU", None

    def __init__(self, number, slice_index):
        self.id, self.slice_index, self.process_index = number, slice_index, slice_index


def test_hosts_of_gpus_share_a_mesh_and_the_state_is_split_within_each():
    """jax takes each host's GPUs for a slice of their own, and `jax.make_mesh` refuses several."""
    hosts = [SliceDevice(i, i // 4) for i in range(8)]
    for fsdp in (1, 2, 4):
        mesh = make_mesh(fsdp, hosts)
        assert dict(mesh.shape) == {"data": 8 // fsdp, "fsdp": fsdp}
        assert mesh.axis_types == make_mesh(fsdp).axis_types
        assert {device.id for device in mesh.devices.flat} == set(range(8))
        for row in mesh.devices:
            assert len({device.slice_index for device in row}) == 1
    with pytest.raises(ValueError, match=r"fsdp .* 4 of each of 2 slices, got 8$"):
        make_mesh(8, hosts)


def test_a_group_is_what_a_device_holds_at_a_time_or_divides_it():
    mesh = make_mesh()
    assert samples_per_group(256, 1, None, mesh) == 32
    assert samples_per_group(256, 2, None, mesh) == 16
    assert samples_per_group(256, 2, 8, mesh) == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((100, 1, None), r"batch_size .* 8 devices .* 1, got 100"),
        ((64, 3, None), r"batch_size .* 8 devices .* 3, got 64"),
        ((0, 1, None), r"batch_size .* got 0 and 1"),
        ((64, 0, None), r"accumulation .* got 64 and 0"),
        ((64, 1, 16), r"bn_group .* 8 samples .* got 16"),
        ((64, 1, 3), r"bn_group .* 8 samples .* got 3"),
        ((64, 1, 0), r"bn_group .* 8 samples .* got 0"),
    ],
)
def test_a_batch_that_cannot_be_divided_is_refused(arguments, message):
    with pytest.raises(ValueError, match=f"{message}$"):
        samples_per_group(*arguments, make_mesh())


def test_flops_of_a_convolution_and_a_dense_layer():
    """Two per multiplication: 8x8 places, 1x1 window, 3 by 5 channels; then 5 by 7."""

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(3, 5, (1, 1), use_bias=False, rngs=rngs)
            self.linear = nnx.Linear(5, 7, use_bias=False, rngs=rngs)

        def __call__(self, x):
            return self.linear(self.conv(x)[:, 0, 0])

    model = nnx.eval_shape(lambda: Net(nnx.Rngs(0)))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    assert forward_flops(graphdef, params, rest, (8, 8, 3)) == 2 * (64 * 15 + 35)


@pytest.mark.parametrize("kind", ["target", "hs"])
def test_flops_of_b1_are_the_published_ones_whatever_the_search_merges(kind):
    """11.9 G multiplications at 224 pixels, of a network in training mode too."""
    draw = lambda: create_model("RepOpt-VGG-B1", kind, bn_group=8, rngs=nnx.Rngs(0))  # noqa: E731
    model = nnx.eval_shape(draw)
    found = forward_flops(*nnx.split(model, nnx.Param, ...), (224, 224, 3))
    assert found / 2e9 == pytest.approx(11.9, abs=0.1)


def test_flops_of_grouped_convolutions_and_of_loops():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(4, 8, (3, 3), feature_group_count=4, use_bias=False, rngs=rngs)

        def __call__(self, x):
            y, _ = jax.lax.scan(lambda x, _: (x @ jnp.ones((8, 8)), None), self.conv(x), length=5)
            return y

    model = nnx.eval_shape(lambda: Net(nnx.Rngs(0)))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    expected = 2 * (16 * 9 * 8 + 5 * 16 * 64)
    assert forward_flops(graphdef, params, rest, (4, 4, 4)) == expected


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("cpu", None),
    ],
)
def test_peaks_are_looked_up_by_the_longest_name(kind, peak):
    assert peak_flops(kind) == peak


def test_a_run_tells_speed_utilization_and_memory_and_records_a_profile(tmp_path, monkeypatch):
    """With a peak and a memory made up for the CPU, which tells neither, and no real step."""

    def step(graphdef, tx, options, state, batch):
        return state._replace(step=state.step + 1), {"loss": jnp.ones(())}

    monkeypatch.setattr(inputs, "jitted_train_step", step)
    monkeypatch.setattr(loop, "evaluate_state", lambda *_: {f"eval/{n}": 1.0 for n in EVALUATED})
    monkeypatch.setitem(devices.PEAK_BFLOAT16, "cpu", 1e12)
    monkeypatch.setattr(loop, "peak_memory", lambda: 3 * 2**30)
    config = small_config(parts=("plain",), profile_steps=2, target__epochs=1.5)  # 17 steps
    config.eval_every = config.checkpoint.every = 9.0  # only at the end
    run.run(config, tmp_path)
    last = read_metrics(tmp_path / "plain" / "metrics.jsonl")[-1]
    assert last["device/peak_memory_gib"] == 3
    speed, count = last["train/images_per_second"], len(jax.devices())
    part_flops = last["train/mfu"] * 1e12 * count / (3 * speed)
    macs = 64 * 27 * 4 + 16 * 36 * 4 + 4 * 36 * 4 + 4 * 36 * 8 + 4 * 72 * 8 + 80
    assert part_flops == pytest.approx(2 * macs, rel=1e-6)
    (trace,) = (tmp_path / "plain" / "profile").rglob("*.xplane.pb")
    assert trace.stat().st_size > 1000


def test_a_profile_that_is_not_wanted_records_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(jax.profiler, "start_trace", lambda *_: pytest.fail("recorded"))
    profile = Profile(tmp_path, 0, 0)
    for step in range(1, 30):
        profile.step(step, ())
    profile.close()
    assert not list(tmp_path.iterdir())
