"""Claim: a run that is killed again and again ends with the bits of an undisturbed one.

    python benchmarks/kill_and_resume.py --kills 20 --seed 0

Trains a search and a target on digits once undisturbed, and once with SIGKILL at random moments
and the same command again after each. Compares every array of the final states (parameters,
BatchNorm, optimizer, averages), the scales file, and all metrics but times. Exits with
status 1 at a difference. With `--processes 2` two processes train together, and one of them, drawn
by chance, is killed; the other has to end by itself with a sentence.
"""

import argparse
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile

import jax
import numpy as np
from environment import environment
from small_run import (
    SETTINGS,
    command,
    interrupt,
    kill_one,
    lines_written,
    small_config,
    start_joined,
)

from repopt_jax.files import load_scales
from repopt_jax.training.checkpoints import Checkpoints
from repopt_jax.training.devices import make_mesh
from repopt_jax.training.parts import prepare
from repopt_jax.training.report import format_table, read_metrics, write_json


def run_to_end(workdir, processes: int, **options) -> None:
    """Run in one process or two; `options` are of `subprocess.Popen`."""
    if processes == 1:
        subprocess.run(command(workdir), check=True, capture_output=True, **options)
        return
    both = start_joined(workdir, **options)
    outputs = [process.communicate()[1] for process in both]
    if any(process.returncode for process in both):
        raise RuntimeError("\n".join(outputs))


def kill_until_done(
    workdir, kills: int, total: int, rng: random.Random, processes: int = 1, **options
) -> list[dict]:
    """Run with `kills` kills in ascending moments of the `total` steps, then to its end.

    Args:
      workdir: its directory.
      kills: how many.
      total: steps of both parts.
      rng: draws the moments.
      processes: 1 or 2 that train together; of 2, `rng` draws the one that is killed.
      **options: of `subprocess.Popen`.

    Returns:
      For every kill, what it found.
    """
    found = []
    for number, lines in enumerate(sorted(rng.choices(range(total), k=kills)), 1):
        moment = {"lines": lines, "delay": rng.uniform(0, 0.1)}  # in a step, an evaluation, a save
        if processes == 1:
            arguments = command(workdir)
            status, _ = interrupt(arguments, workdir, signal.SIGKILL, **moment, **options)
            kill = {"status": status}
        else:
            victim = rng.randrange(2)
            # A new step shows that they have joined; until then jax waits 300 s for a late one.
            moment["lines"] = max(lines, lines_written(workdir) + 1)
            both = start_joined(workdir, **options)
            status, other, said, seconds = kill_one(both, victim, workdir, **moment)
            # jax's own lines may come after it, where the first process has gone.
            sentence = next((x for x in said.splitlines() if "another process" in x), "")
            kill = {"status": status, "victim": victim, "other": other, "seconds": seconds}
            kill |= {"said": sentence, "traceback": "Traceback" in said}
        found.append({"kill": number, "lines": lines_written(workdir)} | kill)
        print(f"kill {number} of {kills}: {lines_written(workdir)} of {total} steps done, {kill}")
    run_to_end(workdir, processes, **options)
    return found


def differences(one, other) -> list[str]:
    """What differs between the results of two finished runs."""
    one, other = pathlib.Path(one), pathlib.Path(other)
    found = []
    for part in SETTINGS["parts"]:
        states = final_states(small_config(), part, one, other)
        paths = jax.tree_util.tree_leaves_with_path(states[0])
        for (path, a), b in zip(paths, jax.tree.leaves(states[1]), strict=True):
            if np.asarray(a).tobytes() != np.asarray(b).tobytes():
                found.append(f"{part}: the final state{jax.tree_util.keystr(path)}")
        records = [
            [_without_times(r) for r in read_metrics(workdir / part / "metrics.jsonl")]
            for workdir in (one, other)
        ]
        if records[0] != records[1]:
            found.append(f"{part}: metrics.jsonl")
        summaries = [json.loads((w / part / "summary.json").read_text()) for w in (one, other)]
        if _without_times(summaries[0]) != _without_times(summaries[1]):
            found.append(f"{part}: summary.json")
    if _scales(one) != _scales(other):  # the file's own bytes hold its metadata in any order
        found.append("scales.safetensors")
    return found


def _scales(workdir: pathlib.Path):
    scales = load_scales(workdir / "scales.safetensors")
    return {path: vector.tobytes() for path, vector in scales.flat().items()}, scales.metadata


def _without_times(record: dict) -> dict:
    times = ("seconds", "train/images_per_second", "train/input_wait", "eval/input_wait")
    return {k: v for k, v in record.items() if k not in times}


def final_states(config, name: str, *workdirs: pathlib.Path) -> list:
    """The last state of the part `name` in each working directory."""
    mesh = make_mesh(devices=jax.devices()[:1])
    scales = load_scales(workdirs[0] / "scales.safetensors")
    part = prepare(config, name, mesh, scales)
    shapes = jax.eval_shape(part.init)
    found = []
    for workdir in workdirs:
        checkpoints = Checkpoints(workdir / name, read_only=True)
        step, state = checkpoints.restore(shapes, step=part.steps)
        checkpoints.close()
        assert step == part.steps == int(state.step)
        found.append(state)
    return found


def main():
    """Run both, print a table and exit with status 1 at a difference."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, choices=(1, 2), default=1)
    parser.add_argument("--json", help="also write the result to this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        undisturbed, killed = pathlib.Path(folder, "undisturbed"), pathlib.Path(folder, "killed")
        # Most of a start is compilation, which the interrupted run would do again and again.
        variables = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": f"{folder}/compiled",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        processes = arguments.processes
        run_to_end(undisturbed, processes, env=variables)
        total, rng = lines_written(undisturbed), random.Random(arguments.seed)
        kills = kill_until_done(killed, arguments.kills, total, rng, processes, env=variables)
        different = differences(undisturbed, killed)
    header = [
        "kill",
        "lines",
        "status",
        *("victim", "other", "seconds", "said")[: 4 * processes - 4],
    ]
    print(format_table([[kill[name] for name in header] for kill in kills], header))
    verdict = f"different: {', '.join(different)}" if different else "identical to the last bit"
    hits = sum(kill["status"] == -signal.SIGKILL for kill in kills)  # others came after the end
    print(f"\n{hits} kills, {total} lines of metrics: the two runs are {verdict}.")
    if arguments.json:
        found = {
            "environment": environment("jax", "orbax-checkpoint", "numpy"),
            "kills": kills,
            "lines": total,
        }
        write_json(arguments.json, found | {"different": different})
    sys.exit(1 if different else 0)


if __name__ == "__main__":
    main()
