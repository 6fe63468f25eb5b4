"""Which operations of a compiled program its time goes to, by JAX's profiler."""

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
      run: a function that runs a number of steps and waits for their end.
      steps: how many to look at.
      most: how many names to return; the others are summed as "others".

    Returns:
      Name -> share. Empty where the profiler does not tell operations.
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
