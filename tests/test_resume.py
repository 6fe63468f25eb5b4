"""A run that is stopped in any way goes on, and ends with the bits of an undisturbed one.

One story, told once by `story`, because every chapter is a process of its own: an undisturbed
run; another one that is killed twice, then asked to end, then finds its newest checkpoint
damaged, and then comes to its end.
"""

import os
import random
import signal
import subprocess

import kill_and_resume
import pytest
from small_run import command, interrupt, lines_written

pytestmark = pytest.mark.slow


def environment(folder):
    """One device, and no program compiled twice."""
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=1"
    cache = {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")}
    cache |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    return os.environ | cache | {"XLA_FLAGS": flags}


def newest_checkpoint(workdir):
    folders = [p for p in (workdir / "target" / "checkpoints").iterdir() if p.name.isdigit()]
    return max(folders, key=lambda p: int(p.name))


def finish(workdir, env):
    pipes = {"capture_output": True, "text": True, "timeout": 300}
    return subprocess.run(command(workdir), env=env, **pipes)


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    folder = tmp_path_factory.mktemp("story")
    env, rng = environment(folder), random.Random(0)
    whole, broken = folder / "undisturbed", folder / "disturbed"
    found = {"whole": whole, "broken": broken, "undisturbed": finish(whole, env)}
    total = lines_written(whole)
    moments = sorted(rng.sample(range(total * 3 // 4), 2))
    found["kills"] = []
    for lines in moments:
        chapter = {"lines": lines, "delay": rng.uniform(0, 0.05), "env": env}
        status, _ = interrupt(command(broken), broken, signal.SIGKILL, **chapter)
        found["kills"].append((status, lines_written(broken)))
    lines = total * 4 // 5
    found["terminated"] = interrupt(
        command(broken), broken, signal.SIGTERM, lines=lines, delay=0.0, env=env
    )
    found["damaged"] = newest_checkpoint(broken)
    for file in found["damaged"].glob("state/**/d/*"):  # where the numbers are
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    found["finished"] = finish(broken, env)
    return found


def test_killed_runs_end_with_the_bits_of_an_undisturbed_one(story):
    """Every array of both final states, the scales and all metrics but the seconds."""
    assert story["undisturbed"].returncode == story["finished"].returncode == 0
    assert [status for status, _ in story["kills"]] == [-signal.SIGKILL] * 2
    assert kill_and_resume.differences(story["whole"], story["broken"]) == []


def test_sigterm_saves_and_says_in_one_sentence_that_the_command_goes_on(story):
    status, said = story["terminated"]
    assert status == 128 + signal.SIGTERM
    sentence = said.splitlines()[-1]
    step = story["damaged"].name
    expected = f"train.py: SIGTERM received: target is saved at step {step} of 33; "
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
