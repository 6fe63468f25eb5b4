"""A run that is stopped in any way goes on, and ends with the bits of an undisturbed one.

One story, told once by `story`, because every chapter is a process of its own: a run that nothing
stops, though nobody reads what it says after its first lines; and another one that is killed in
its search, asked to end in its target, finds its newest checkpoint damaged, and comes to its end.
"""

import os
import random
import signal
import subprocess

import kill_and_resume
import pytest
from small_run import command, interrupt, small_config

pytestmark = pytest.mark.slow

SEARCH, TARGET = 11, 22  # steps
FLAGS = ("--config.search.epochs=1.0", "--config.target.epochs=2.0")


def environment(folder):
    """One device, and no program compiled twice."""
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=1"
    cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")}
    cache |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return os.environ | cache | {"XLA_FLAGS": flags}


def newest_checkpoint(workdir):
    folders = [p for p in (workdir / "target" / "checkpoints").iterdir() if p.name.isdigit()]
    return max(folders, key=lambda p: int(p.name))


def hardly_read(workdir, env):
    """The exit status of a run whose output nobody reads after three lines."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command(workdir, *FLAGS), env=env, **pipes) as process:
        for _ in range(3):
            process.stdout.readline()
        process.stdout.close()
    return process.returncode


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    folder = tmp_path_factory.mktemp("story")
    env, rng = environment(folder), random.Random(0)
    whole, broken = folder / "undisturbed", folder / "disturbed"
    found = {"whole": whole, "broken": broken, "undisturbed": hardly_read(whole, env)}

    def interrupted(signal, **moment):
        return interrupt(command(broken, *FLAGS), broken, signal, env=env, **moment)

    moment = {"lines": rng.randrange(4, SEARCH - 1), "delay": rng.uniform(0, 0.05)}
    found["killed"], _ = interrupted(signal.SIGKILL, **moment)
    found["terminated"] = interrupted(signal.SIGTERM, lines=SEARCH + 14, delay=0.0)
    found["damaged"] = newest_checkpoint(broken)
    for file in found["damaged"].glob("state/**/d/*"):  # where the numbers are
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    pipes = {"capture_output": True, "text": True, "timeout": 300}
    found["finished"] = subprocess.run(command(broken, *FLAGS), env=env, **pipes)
    return found


def test_a_run_whose_output_nobody_reads_goes_on_to_its_end(story):
    assert story["undisturbed"] == 0
    assert (story["whole"] / "summary.json").exists()
    log = (story["whole"] / "target" / "train.log").read_text()
    assert f"target step {TARGET}" in log


def test_a_killed_run_ends_with_the_bits_of_an_undisturbed_one(story, monkeypatch):
    """Every array of both final states, the scales and all metrics but the seconds."""
    config = small_config(search__epochs=1.0, target__epochs=2.0)
    monkeypatch.setattr(kill_and_resume, "small_config", lambda: config)
    assert story["killed"] == -signal.SIGKILL
    assert story["finished"].returncode == 0
    assert kill_and_resume.differences(story["whole"], story["broken"]) == []


def test_sigterm_saves_and_says_in_one_sentence_that_the_command_goes_on(story):
    status, said = story["terminated"]
    assert status == 128 + signal.SIGTERM
    sentence = said.splitlines()[-1]
    step = story["damaged"].name
    expected = f"train.py: SIGTERM received: target is saved at step {step} of {TARGET}; "
    assert sentence == expected + "the same command goes on from there"
    assert "Traceback" not in said


def test_a_damaged_newest_checkpoint_is_told_and_the_one_before_is_used(story):
    said = story["finished"].stderr
    told = [line for line in said.splitlines() if str(story["damaged"]) in line]
    assert len(told) == 1 and "is damaged and not used" in told[0]
    assert "Traceback" not in said
    log = (story["broken"] / "target" / "train.log").read_text()
    assert f"{story['damaged']} is damaged and not used" in log
    first = next(line for line in said.splitlines() if " target " in line)
    assert int(first.split(" target ")[1].split("/")[0]) <= int(story["damaged"].name)
