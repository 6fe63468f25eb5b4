"""The operations that a compiled program spends its time in, by JAX's profiler."""

import collections
import gzip
import json
import pathlib
import re
import tempfile

import jax


def op_shares(run, steps=3, most=12):
    """Shares of the device's operations in their total time, by name without number.

    Args:
      run: a function that runs a number of steps and waits for them.
      steps: the number of steps to profile.
      most: the number of names to return; the rest is summed as "others".

    Returns:
      Share by name. Empty where the profiler reports no operations.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run(steps)
        (file,) = pathlib.Path(folder).rglob("*.trace.json.gz")
        events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    times = collections.Counter()
    for event in events:
        if event.get("ph") == "X" and "hlo_op" in event.get("args", {}):
            # One program's operations nest in no other, so that durations add up.
            name = re.sub(r"([._]\d+|\.clone)*$", "", event["args"]["hlo_op"])
            times[name] += event["dur"]
    total = sum(times.values())
    found = {name: round(time / total, 4) for name, time in times.most_common(most)}
    if len(times) > most:
        found["others"] = round(1 - sum(found.values()), 4)
    return found
