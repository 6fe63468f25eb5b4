"""The cost of a training step: target, search networks, RepVGG, and the target in PyTorch.

    python benchmarks/step_time.py                         # this machine's defaults
    python benchmarks/step_time.py --models RepOpt-VGG-B2 --sizes 160 --batches 16 --rounds 5

Times the training step of the target (with and without multipliers), of both search networks and
of RepVGG, each compiled by XLA, and beside them the same network in PyTorch where it is installed,
eager and compiled. Also times the optimizer's update alone, and profiles the target's operations.

A round runs every variant once; every second round goes from the last to the first. Times are
medians over the rounds, ratios are medians of the rounds' ratios to the target. On CPU the ratio
of CPU seconds stands beside that of seconds, because other work on the machine disturbs it less.
Both libraries get all cores.

Defaults: A0 and B1 at 64 px on CPU; B1 at 224 px in bfloat16 and batches of 32 to 512 on GPU, with
the share of the device's peak arithmetic (MFU), at 6 operations per multiply-add of the forward
pass. A variant that does not fit into the device's memory is left out, with the reason.
"""

import argparse
import gc
import importlib.util
import json
import os
import pathlib
import statistics
import time

# Both libraries share the device, so neither may reserve all of its memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
# Torch's waiting threads would spin into the next variant's turn. On a busy machine they would even
# slow the thread that they wait for (4 s a step instead of 0.5).
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import jax
import jax.numpy as jnp
import numpy as np
from environment import RESULTS, environment
from jax_steps import VARIANTS, JaxStep, UpdateStep, compile_timed, multiply_adds
from op_shares import op_shares

from repopt_jax.models.repopt_vgg import SIZES
from repopt_jax.training.devices import peak_flops

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "torch", "jax-cuda12-plugin")
TORCH_VARIANTS = {"torch, eager": False, "torch, compiled": True}  # whether it is compiled
ON_CPU = jax.default_backend() == "cpu"


def peak(dtype):
    """Operations per second of the device. None: not known."""
    device = jax.devices()[0]
    found = peak_flops(device.device_kind)
    as_tf32 = device.platform == "gpu" and dtype == "float32"  # at half the speed of bfloat16
    return found / 2 if found and as_tf32 else found


def torch_steps(flags, name, images, labels, dtype):
    """Makers of the wanted steps in PyTorch, by name; none where it cannot run on the device."""
    if not TORCH_VARIANTS.keys() & set(flags.variants) or importlib.util.find_spec("torch") is None:
        return {}
    import torch
    from torch_vgg import TorchStep, fair_float32

    if not ON_CPU and not torch.cuda.is_available():
        return {}
    fair_float32()
    size = [SIZES[name][key] for key in ("num_blocks", "widths")]
    options = {"bfloat16": dtype == "bfloat16"}
    return {
        variant: lambda compiled=compiled: TorchStep(
            *size, images, labels, compiled=compiled, **options
        )
        for variant, compiled in TORCH_VARIANTS.items()
        if variant in flags.variants
    }


def started(makers, warmup):
    """The steps that fit into memory, warmed up; and for the others the reason by name."""
    steps, left_out = {}, {}
    for name, make in makers.items():
        try:
            if name.startswith("torch"):
                from torch_vgg import TorchStep

                TorchStep.reset_peak()
            start = time.perf_counter()
            step = make()
            step.run(1)
            step.start_seconds = time.perf_counter() - start
            step.run(warmup)
            step.peak = step.peak_bytes()
            steps[name] = step
        except RuntimeError as error:  # both libraries' exhausted memory is one
            if "memory" not in str(error).lower() and "exhausted" not in str(error).lower():
                raise
            left_out[name] = "out of memory"
    return steps, left_out


def timed(steps, rounds, count):
    """Seconds and CPU seconds per step of every variant in every round."""
    times = {name: {"wall": [], "cpu": []} for name in steps}
    for i in range(rounds):
        for name, step in list(steps.items())[:: -1 if i % 2 else 1]:
            wall, cpu = time.perf_counter(), time.process_time()
            step.run(count)
            times[name]["wall"].append((time.perf_counter() - wall) / count)
            times[name]["cpu"].append((time.process_time() - cpu) / count)
    return times


def ratio(times, name, base, clock="wall"):
    """Median over the rounds of one variant's time divided by another's."""
    pairs = zip(times[name][clock], times[base][clock], strict=True)
    return round(statistics.median(a / b for a, b in pairs), 4)


def compare_steps(flags, name, size, batch, dtype):
    """Time all variants in one setting."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (batch, size, size, 3), np.uint8)
    labels = rng.integers(0, 1000, batch, np.int32)
    makers = {
        variant: lambda variant=variant: JaxStep(name, variant, images, labels, jnp.dtype(dtype))
        for variant in flags.variants
        if variant in VARIANTS
    }
    makers |= torch_steps(flags, name, images, labels, dtype)
    steps, left_out = started(makers, warmup=1 if ON_CPU else 10)
    times = timed(steps, flags.rounds, flags.steps)
    operations = 6 * multiply_adds(name, size) * batch
    rows = []
    for variant, step in steps.items():
        seconds = statistics.median(times[variant]["wall"])
        row = {
            "variant": variant,
            "milliseconds": round(1e3 * seconds, 3),
            "images_per_second": round(batch / seconds, 1),
            "start_seconds": round(step.start_seconds, 1),
            "device_peak_bytes": step.peak,
        }
        if "target" in steps:
            row["time_to_target"] = ratio(times, variant, "target")
            row["cpu_time_to_target"] = ratio(times, variant, "target", "cpu")
        if peak(dtype) and variant != "repvgg":  # which runs more operations than are counted
            row["mfu"] = round(operations / seconds / peak(dtype), 4)
        if isinstance(step, JaxStep):
            row |= {
                "compile_seconds": round(step.compile_seconds, 2),
                "program_bytes": step.program_bytes,
                "parameter_bytes": step.parameter_bytes,
                "optimizer_bytes": step.optimizer_bytes,
            }
        rows.append(row)
    result = {
        "model": name, "size": size, "batch": batch, "dtype": dtype, "rows": rows,
        "left_out": left_out, "giga_multiply_adds": round(multiply_adds(name, size) / 1e9, 3),
    }  # fmt: skip
    if "target" in steps:
        result["op_shares"] = op_shares(steps["target"].run)
    if {"target", "target, plain SGD"} <= steps.keys():
        result["compile"] = compare_compilation(
            steps["target"], steps["target, plain SGD"], flags.compilations
        )
    return result


def compare_compilation(multiplied, plain, rounds):
    """Time to trace and compile the target's step with multipliers, divided by that without."""
    pairs = []
    for i in range(rounds):
        times = {}
        # Neither may always follow the other, or pay for the other's garbage.
        for step in (plain, multiplied) if i % 2 else (multiplied, plain):
            gc.collect()
            _, *times[step] = compile_timed(step.lower)
        pairs.append([a / b for a, b in zip(times[multiplied], times[plain], strict=True)])
    wall, cpu = zip(*pairs, strict=True)
    return {"time": round(statistics.median(wall), 4), "cpu_time": round(statistics.median(cpu), 4)}


def compare_updates(flags, name):
    """Time the optimizer's update with and without multipliers.

    Three pairs have arrays of their own; the spread of their ratios shows how well the figure is
    known.
    """
    pairs = []
    for _ in range(3):
        steps = {"multiplied": UpdateStep(name, True), "plain": UpdateStep(name, False)}
        for step in steps.values():
            step.run(2)
        pairs.append(timed(steps, 5 * flags.rounds, 1 if ON_CPU else 20))
    parameters = sum(x.nbytes for x in jax.tree.leaves(steps["plain"].params))
    extra = sum(x.nbytes for x in jax.tree.leaves(steps["multiplied"].state))
    extra -= sum(x.nbytes for x in jax.tree.leaves(steps["plain"].state))
    programs = steps["multiplied"].program_bytes - steps["plain"].program_bytes
    times = {
        step: {clock: [t for pair in pairs for t in pair[step][clock]] for clock in ("wall", "cpu")}
        for step in steps
    }
    return {
        "model": name,
        "milliseconds_plain": round(1e3 * statistics.median(times["plain"]["wall"]), 3),
        "time": ratio(times, "multiplied", "plain"),
        "cpu_time": ratio(times, "multiplied", "plain", "cpu"),
        "time_by_pair": [ratio(pair, "multiplied", "plain") for pair in pairs],
        "extra_state_to_parameters": round(extra / parameters, 6),
        "extra_program_to_parameters": round(programs / parameters, 6),
    }


def print_steps(result):
    """Print the table of one setting."""
    print(
        f"\n{result['model']} {result['size']} px, batch {result['batch']}, {result['dtype']}, "
        f"{result['giga_multiply_adds']} G multiply-adds an image"
    )
    print(f"{'variant':20}{'ms':>9}{'images/s':>10}{'/target':>9}{'CPU':>7}{'compile s':>11}"
          f"{'GB':>7}{'MFU':>7}")  # fmt: skip
    for row in result["rows"]:
        memory = row["device_peak_bytes"] if "torch" in row["variant"] else row["program_bytes"]
        cells = (
            (row.get("time_to_target"), "9.3f"),
            (row.get("cpu_time_to_target"), "7.3f"),
            (row.get("compile_seconds"), "11.1f"),
            (None if memory is None else memory / 1e9, "7.2f"),
            (row.get("mfu"), "7.3f"),
        )
        texts = [
            "-".rjust(int(style.split(".")[0])) if value is None else format(value, style)
            for value, style in cells
        ]
        print(
            f"{row['variant']:20}{row['milliseconds']:9.1f}{row['images_per_second']:10.1f}"
            + "".join(texts)
        )
    for variant, reason in result["left_out"].items():
        print(f"{variant:20}{reason}")
    if "compile" in result:
        print(f"compilation with multipliers / without: {result['compile']}")
    print("shares of the target's time:", result.get("op_shares"))


def parse():
    """The flags, with defaults that fit the device."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    models = ["RepOpt-VGG-A0", "RepOpt-VGG-B1"] if ON_CPU else ["RepOpt-VGG-B1"]
    parser.add_argument("--models", nargs="+", default=models, choices=sorted(SIZES))
    parser.add_argument("--sizes", nargs="+", type=int, default=[64] if ON_CPU else [224])
    batches = [32] if ON_CPU else [32, 64, 128, 256, 512]
    parser.add_argument("--batches", nargs="+", type=int, default=batches)
    dtypes = ["float32"] if ON_CPU else ["bfloat16"]
    parser.add_argument("--dtypes", nargs="+", default=dtypes, choices=["float32", "bfloat16"])
    variants = [*VARIANTS, *TORCH_VARIANTS]
    parser.add_argument("--variants", nargs="+", default=variants, choices=variants)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=1 if ON_CPU else 20, help="per round")
    parser.add_argument("--compilations", type=int, default=9)
    label = "cpu" if ON_CPU else jax.devices()[0].device_kind.lower().replace(" ", "_")
    parser.add_argument("--output", default=str(RESULTS / f"step_time_{label}.json"))
    return parser.parse_args()


def main():
    """Measure, print the tables, and write the JSON after every setting."""
    flags = parse()
    result = {
        "what": __doc__.splitlines()[0],
        "environment": environment(*PACKAGES),
        "rounds": flags.rounds,
        "updates": [],
        "steps": [],
    }
    path = pathlib.Path(flags.output)
    path.parent.mkdir(exist_ok=True)
    settings = [
        (name, size, batch, dtype)
        for name in flags.models
        for size in flags.sizes
        for dtype in flags.dtypes
        for batch in flags.batches
    ]
    for name in flags.models:
        result["updates"].append(compare_updates(flags, name))
        print("update with multipliers / plain:", result["updates"][-1], flush=True)
    for setting in settings:
        result["steps"].append(compare_steps(flags, *setting))
        print_steps(result["steps"][-1])
        path.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
