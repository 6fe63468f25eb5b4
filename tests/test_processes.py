"""Two real processes, joined over gloo, train as one does; signals and clocks are agreed on."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import small_run
from kill_and_resume import final_states
from small_run import kill_one, lines_written, small_config, start_joined

from repopt_jax.training import processes, run
from repopt_jax.training.devices import make_mesh
from repopt_jax.training.processes import join_processes

SETTINGS = {"dtype": "float64", "checkpoint.every": 0.5}
for _part in ("search", "target"):
    SETTINGS |= {f"{_part}.epochs": 1.0, f"{_part}.random_erasing": 0.3}  # 11 steps each
    SETTINGS |= {f"{_part}.mix.mixup": 0.2, f"{_part}.mix.cutmix": 1.0}
FLAGS = [f"--config.{name}={value}" for name, value in SETTINGS.items()]


def environment(folder):
    """One device for each process, and no program compiled twice."""
    cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")}
    cache |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_ENABLE_X64": "1"}
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=1"
    return dict(os.environ) | cache | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def configuration():
    return small_config(**{name.replace(".", "__"): value for name, value in SETTINGS.items()})


def outcomes(both):
    """What each process wrote, and its exit status."""
    try:
        return [(*process.communicate(timeout=200), process.returncode) for process in both]
    finally:
        for process in both:
            process.kill()


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """One process with two devices; and two, of which one is told to stop, and then to the end.

    The host sends the images, but those of the target at the end, which lie on the devices.
    """
    folder = tmp_path_factory.mktemp("processes")
    alone, together = folder / "alone", folder / "together"
    two_devices = make_mesh(devices=jax.devices()[:2])
    with jax.enable_x64(True), pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "make_mesh", lambda *_: two_devices)
        run.run(configuration(), alone)
    env = environment(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(small_run.SETTINGS, "parts", ("search",))  # they come no further
        both = start_joined(together, *FLAGS, env=env)
    begun = time.monotonic()
    while lines_written(together) < 4 and both[0].poll() is None and time.monotonic() < begun + 200:
        time.sleep(0.01)
    both[1].send_signal(signal.SIGTERM)
    stopped = outcomes(both)
    chunks = ("--config.target.data.on_device=always", "--config.log_every=5")
    ended = outcomes(start_joined(together, *FLAGS, *chunks, env=env))
    return {"alone": alone, "together": together, "stopped": stopped, "ended": ended}


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_at_the_same_step(story):
    sentences = [err.splitlines()[-1] for _, err, _ in story["stopped"]]
    assert [code for *_, code in story["stopped"]] == [143, 143], story["stopped"]
    assert "SIGTERM received: search is saved at step" in sentences[0]
    assert sentences[0] == sentences[1]


@pytest.mark.slow
def test_two_processes_end_with_the_parameters_of_one(story):
    """In float64 to 1e-12, through search, scales, target, mixing and a stop in between.

    Whether the host sends the images, in the search, or they lie on the devices, in the target.
    """
    assert [code for *_, code in story["ended"]] == [0, 0], story["ended"]
    for part in ("search", "target"):
        with jax.enable_x64(True):
            both = story["alone"], story["together"]
            alone, together = final_states(configuration(), part, *both)
        assert len(jax.tree.leaves(alone.params)) > 10
        pairs = zip(jax.tree.leaves(alone.params), jax.tree.leaves(together.params), strict=True)
        for one, other in pairs:
            assert one.dtype == np.float64
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-12)


@pytest.mark.slow
def test_only_the_first_process_writes_and_prints(story):
    (out, _, _), (other, err, _) = story["ended"]
    assert "RepOptimizer" in out
    assert not [line for line in other.splitlines() if "Gloo" not in line]
    assert "search" not in err
    summary = json.loads((story["together"] / "summary.json").read_text())
    assert summary["machine"]["devices"] == 2


def check_the_survivor(status, other, said, seconds):
    assert (status, other) == (-signal.SIGKILL, 1)
    assert seconds < 120
    assert "another process of this run has ended" in said  # jax's own lines may come after it
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_killed_process_ends_the_training_of_the_first_with_a_sentence(
    story, tmp_path, monkeypatch
):
    monkeypatch.setitem(small_run.SETTINGS, "parts", ("search",))
    both = start_joined(tmp_path, *FLAGS, env=environment(story["together"].parent))
    check_the_survivor(*kill_one(both, 1, tmp_path, lines=3, delay=0.0))


COLLECTIVES = """
import pathlib, sys
from repopt_jax.training import command_line, processes, run
def collectives(_, workdir):
    processes.agreed([0])
    metrics = pathlib.Path(workdir, "search", "metrics.jsonl")
    metrics.parent.mkdir(exist_ok=True)
    metrics.write_text("one step\\n")
    while True:
        processes.agreed([0])
run.run = collectives
command_line.main()
"""


@pytest.mark.slow
def test_when_the_first_process_is_killed_the_other_ends_with_a_sentence(tmp_path):
    """jax, which the first has served, ends it whatever it does; here collectives and no step."""
    flags = [f"--workdir={tmp_path}", f"--coordinator_address=localhost:{free_port()}"]
    command = [sys.executable, "-c", COLLECTIVES, *flags, "--num_processes=2"]
    pipes = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    both = [
        subprocess.Popen([*command, f"--process_id={i}"], env=environment(tmp_path), **pipes)
        for i in range(2)
    ]
    check_the_survivor(*kill_one(both, 0, tmp_path, lines=1, delay=0.0))


ABORT = """
import ctypes, socket, sys, threading
from repopt_jax.training import processes
here, there = socket.socketpair()
processes._hold_aborts()
threading.Thread(target=processes._watch, args=(here,), daemon=True).start()
if sys.argv[1] == "lost":
    threading.Timer(0.5, there.close).start()
ctypes.CDLL(None).abort()  # as jax does, outside of the interpreter
"""


@pytest.mark.skipif(sys.platform != "linux", reason="aborts are held on Linux only")
@pytest.mark.parametrize(
    ("reason", "status", "sentence"),
    [("lost", 1, True), pytest.param("other", -signal.SIGABRT, False, marks=pytest.mark.slow)],
)
def test_an_abort_waits_for_the_sentence_about_another_process(tmp_path, reason, status, sentence):
    """jax may see that the first process is gone before our thread does; other aborts happen."""
    ended = subprocess.run(
        [sys.executable, "-c", ABORT, reason],
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert ended.returncode == status, ended.stderr
    assert ("another process of this run has ended" in ended.stderr) == sentence


GATHER_AND_ABORT = """
import ctypes, os, sys, time
from repopt_jax.training.processes import agreed, gathered, join_processes
number = int(sys.argv[2])
join_processes(sys.argv[1], 2, number)
print(agreed([number / 3, 1 - number, 2**24 + 1]))
print(gathered(["one", "another process"][number]), flush=True)
if number == 0:
    time.sleep(1)
    os._exit(9)
ctypes.CDLL(None).abort()
"""


@pytest.fixture(scope="module")
def aborted(tmp_path_factory):
    """Of two processes: what they wrote, and how they ended when the second one aborted."""
    address = f"localhost:{free_port()}"
    command = [sys.executable, "-c", GATHER_AND_ABORT, address]
    pipes = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    env = environment(tmp_path_factory.mktemp("aborted"))
    return outcomes([subprocess.Popen([*command, str(i)], env=env, **pipes) for i in range(2)])


@pytest.mark.slow
def test_texts_of_both_processes_are_gathered_in_both(aborted):
    for out, err, _ in aborted:
        assert out.splitlines()[-1:] == ["['one', 'another process']"], err


@pytest.mark.slow
def test_both_processes_agree_on_the_largest_values_exactly(aborted):
    for out, err, _ in aborted:
        assert out.splitlines()[-2:-1] == [str([1 / 3, 1.0, 2.0**24 + 1])], err


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="aborts are held on Linux only")
def test_joined_processes_hold_their_aborts(aborted):
    """The second aborts before the first is gone, and names it all the same."""
    (_, _, first), (_, said, second) = aborted
    assert (first, second) == (9, 1)
    assert "another process of this run has ended" in said


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("localhost:1", None, 0), "missing: count$"),
        ((None, 2, None), "missing: coordinator, index$"),
        (("localhost:1", 2, 2), "index .* 1, got 2$"),
    ],
)
def test_incomplete_arguments_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        join_processes(*given)


@pytest.mark.parametrize(
    ("variables", "asks"),
    [
        ({}, False),
        ({"SLURM_STEP_NUM_TASKS": "4"}, True),
        ({"SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"SLURM_NTASKS": "4"}, False),  # an allocation without srun
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"TPU_PROCESS_ADDRESSES": "a:8471,b:8471"}, True),
        ({"TPU_PROCESS_ADDRESSES": "local", "TPU_ML_PLATFORM": "JAX"}, False),
        ({"TPU_ML_PLATFORM": "JAX"}, True),  # a Cloud TPU VM, whose metadata server jax asks
        ({"TPU_ML_PLATFORM": "JAX", "TPU_SKIP_MDS_QUERY": "1"}, False),
        ({"TPU_ML_PLATFORM": "JAX", "JAX_PLATFORMS": "cpu"}, False),
        ({"MEGASCALE_COORDINATOR_ADDRESS": "a"}, True),
    ],
)
def test_launchers_of_many_processes_are_recognized(monkeypatch, variables, asks):
    others = (processes.TPU_SLICES, "TPU_ML_PLATFORM", "TPU_SKIP_MDS_QUERY", "JAX_PLATFORMS")
    for name in (*processes.COUNTS, *processes.TPU_HOSTS, *others):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    called = []
    monkeypatch.setattr(processes.jax.distributed, "initialize", lambda: called.append(True))
    join_processes()
    assert bool(called) == asks
