"""Writes the README's tables of results from the JSON files in benchmarks/results.

    python benchmarks/readme_tables.py            rewrites what stands between its marks
    python benchmarks/readme_tables.py --check    exits with status 1 if that would change anything

A table stands between ``<!-- NAME.json -->`` and ``<!-- end -->``.
"""

import argparse
import json
import pathlib
import re
import statistics
import sys

README = pathlib.Path(__file__).parents[1] / "README.md"
RESULTS = pathlib.Path(__file__).parent / "results"
# As benchmarks/quantization.py names them, which needs onnx.
NETWORKS = {"repvgg": "RepVGG, folded", "target": "RepOptimizer", "plain": "plain SGD"}


def markdown(header, rows) -> str:
    """A table; the first column is words, the others are numbers."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def over_seeds(values: list[float], digits: int = 1) -> str:
    """Mean and, of several values, standard deviation."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}"


def with_deviation(row: dict) -> str:
    """Top-1 with its standard deviation."""
    return f"{row['top1']:.1f} ± {row['top1_deviation']:.1f}"


def machine(environment: dict) -> str:
    """Processor and cores."""
    return f"{environment['cpu']}, {environment['cores']} cores"


def commit(environment: dict) -> str:
    """Of what code a study was made."""
    changed = " with changes" if environment.get("uncommitted_changes") else ""
    return f"commit {environment['commit']}{changed}"


def made_of(environment: dict, arguments: dict) -> str:
    """In what circumstances a study was made."""
    versions = environment["versions"]
    return (
        f"{arguments['images']:,} CIFAR-10 images, those of 5 classes for the search and the "
        f"others for the rest, batch 128, {len(arguments['seeds'])} seeds; "
        f"{machine(environment)}, jax {versions['jax']}, {commit(environment)}."
    )


def ablation(data: dict) -> str:
    """The variants, the effect against depth, and the sweep of learning rates."""
    rows = [
        (
            r["variant"],
            with_deviation(r),
            f"{r['learning_rate']:g}",
            f"{r['seconds']:.0f}",
            f"{r['images_per_second']:,.0f}",
        )
        for r in data["variants"]
    ]
    table = markdown(("variant", "top-1 %", "learning rate", "seconds", "images/s"), rows)
    layers = sorted({r["layers"] for r in data["depth"]})
    titles = list(dict.fromkeys(r["variant"] for r in data["depth"]))
    by = {(r["variant"], r["layers"]): with_deviation(r) for r in data["depth"]}
    depth = markdown(
        ("top-1 % by depth", *(f"{n} layers" for n in layers)),
        [(title, *(by[title, n] for n in layers)) for title in titles],
    )
    tried: dict[str, list[str]] = {}
    for r in data["sweep"]:
        found = f"{r['learning_rate']:g}: {r['top1']:.1f}"
        tried.setdefault(r["optimizer"], []).append(found)
    sweep = markdown(
        ("sweep of one seed on held-out images", "learning rate: top-1 %"),
        [(optimizer, ", ".join(found)) for optimizer, found in tried.items()],
    )
    facts = made_of(data["environment"], data["arguments"])
    command = f"`python benchmarks/ablation.py --epochs={data['arguments']['epochs']:g}`"
    return f"{table}\n\n{depth}\n\n{sweep}\n\n{command}: {facts}"


def small_models(data: dict) -> str:
    """The variants of the small network."""
    rows = [(r["variant"], with_deviation(r)) for r in data["variants"]]
    table = markdown(("small network (22 layers)", "top-1 %"), rows)
    facts = made_of(data["environment"], data["arguments"])
    lengths = " ".join(map(str, data["arguments"]["lengths"]))
    flags = f"--epochs={data['arguments']['epochs']:g} --lengths {lengths}"
    command = f"`python benchmarks/small_models.py {flags}`"
    return f"{table}\n\n{command}: {facts}"


def input_pipeline(data: dict) -> str:
    """Speeds relative to the official pipeline, by augmentation."""
    augments = list(dict.fromkeys(r["augment"] for r in data["rows"]))
    variants = list(dict.fromkeys(r["variant"] for r in data["rows"]))
    by = {(r["variant"], r["augment"]): r for r in data["rows"]}

    def cell(variant, augment):
        found = by.get((variant, augment))
        if found is None:
            return ""
        times = found["times_official_per_cpu_second"]
        return f"{found['images_per_cpu_second']:.0f} ({times:.2f}x)"

    table = markdown(
        ("ImageNet images per second of one core", *augments),
        [(variant, *(cell(variant, augment) for augment in augments)) for variant in variants],
    )
    two = [f"{r['variant']} ({r['augment']}) {r['speed_up']:.2f}x" for r in data["two_threads"]]
    threads = f"\n\nTwo threads on two cores against one: {', '.join(two)}." if two else ""
    flags = " --two_threads" if two else ""
    command = f"`python benchmarks/input_pipeline.py{flags} --rounds {data['rounds']}`"
    return f"{table}{threads}\n\n{command}: {machine(data['environment'])}."


def quantization(data: dict) -> str:
    """Float, INT8 and spread of the kernels by network."""
    runs = data["runs"]
    networks = [name for name in NETWORKS if any(r["network"] == name for r in runs)]
    settings = list(runs[0]["int8"])

    def cells(read, digits=1):
        for name in networks:
            yield over_seeds([read(r) for r in runs if r["network"] == name], digits)

    rows = [("float top-1 %", *cells(lambda r: r["float"]["top1"]))]
    for setting in settings:
        name = f"INT8 top-1 %, per {setting}"
        rows.append((name, *cells(lambda r, s=setting: r["int8"][s]["top1"])))
    rows.append(("kernel standard deviation", *cells(lambda r: r["kernels"]["std"], 4)))
    largest = cells(lambda r: r["kernels"]["largest over std"])
    rows.append(("largest weight by standard deviation, median layer", *largest))
    least = cells(lambda r: r["kernels"]["least SNR dB"])
    rows.append(("INT8 weights' signal to noise, worst layer (dB)", *least))
    rows.append(("INT8 speed-up", *cells(lambda r: r["speed-up"], 2)))
    table = markdown(("", *(NETWORKS[name] for name in networks)), rows)
    budget, versions = data["budget"], data["environment"]["versions"]
    flags = f"--epochs={budget['epochs']:g} --search-epochs={budget['search_epochs']:g}"
    flags += f" '--train-split={budget['train_split']}' '--eval-split={budget['eval_split']}'"
    seeds = sorted({r["seed"] for r in runs})
    flags += f" --seeds {' '.join(map(str, seeds))}"
    facts = f"{machine(data['environment'])}, onnxruntime {versions['onnxruntime']}"
    facts += f", {commit(data['environment'])}"
    return f"{table}\n\n`python benchmarks/quantization.py {flags}`: {facts}."


def quantization_width(data: dict) -> str:
    """Points of top-1 lost to INT8 by width and network."""
    settings = ("tensor, minmax", "tensor, percentile", "channel, minmax")
    rows = []
    for width in sorted({r["width"] for r in data["runs"]}):
        for network, title in NETWORKS.items():
            own = [r for r in data["runs"] if (r["width"], r["network"]) == (width, network)]
            lost = [over_seeds([r["int8"][s]["drop"] for r in own]) for s in settings]
            spread = over_seeds([r["kernels"]["largest over std"] for r in own], 0)
            top1 = over_seeds([r["float"]["top1"] for r in own])
            deviation = over_seeds([r["kernels"]["std"] for r in own], 4)
            rows.append((f"{width}x, {title}", top1, *lost, deviation, spread))
    header = (
        "width, network", "float top-1 %", "lost per tensor, minmax", "per tensor, percentile",
        "per channel, minmax", "kernel standard deviation", "largest weight by it",
    )  # fmt: skip
    given, versions = data["arguments"], data["environment"]["versions"]
    facts = f"{machine(data['environment'])}, jax {versions['jax']}, onnxruntime "
    facts += f"{versions['onnxruntime']}, {commit(data['environment'])}, "
    seeds = sorted({r["seed"] for r in data["runs"]})
    facts += f"{len(seeds)} seed{'s' * (len(seeds) > 1)}"
    flags = "" if given["config"] == "digits" else f" --config={given['config']}"
    flags += f" --epochs={given['epochs']:g} --widths {' '.join(map(str, given['widths']))}"
    flags += f" --seeds {' '.join(map(str, seeds))}"
    command = f"`python benchmarks/quantization_width.py{flags}`"
    return f"{markdown(header, rows)}\n\n{command}: {facts}."


def step_time(data: dict) -> str:
    """Time by the target's, images per second, and compile time of every variant."""
    settings = data["steps"]
    names = [f"{s['model'].removeprefix('RepOpt-VGG-')}, {s['size']} px" for s in settings]
    by = [{r["variant"]: r for r in s["rows"]} for s in settings]
    header = ["training step"]
    for name in names:
        header += [f"{name}: images/s", "time by the target's", "compile s"]
    rows = []
    for variant in by[0]:
        row = [variant]
        for found in by:
            r = found[variant]
            row += [r["images_per_second"], f"{r['time_to_target']:.2f}"]
            row.append(f"{r['compile_seconds']:.1f}" if "compile_seconds" in r else "")
        rows.append(row)
    parts = [
        f"{u['model'].removeprefix('RepOpt-VGG-')}: update with multipliers {u['time']:.3f} of "
        f"plain SGD's time, {100 * u['extra_state_to_parameters']:.3f} % of the parameters' "
        f"memory; compiling {s['compile']['time']:.2f} of plain SGD's time."
        for u, s in zip(data["updates"], settings, strict=True)
    ]
    versions = data["environment"]["versions"]
    facts = f"batch {settings[0]['batch']}, {settings[0]['dtype']}, {data['rounds']} rounds in "
    facts += f"turns; {machine(data['environment'])}, "
    facts += f"jax {versions['jax']}, torch {versions['torch']}"
    command = f"`python benchmarks/step_time.py --rounds {data['rounds']}"
    if settings[0]["dtype"] == "bfloat16":  # torch's takes seven times as long: one model is enough
        command += f" --models {settings[0]['model']} --dtypes bfloat16"
    command += "`"
    return f"{markdown(header, rows)}\n\n{' '.join(parts)}\n\n{command}: {facts}."


TABLES = {
    "ablation": ablation,
    "small_models": small_models,
    "input_pipeline": input_pipeline,
    "quantization": quantization,
    "quantization_width": quantization_width,
    "quantization_width_cifar10": quantization_width,
    "step_time_cpu": step_time,
    "step_time_cpu_amd": step_time,
    "step_time_cpu_amd_bfloat16": step_time,
}


# Whose commands would write to another file, which has a table of its own.
ELSEWHERE = ("quantization_width_cifar10", "step_time_cpu_amd", "step_time_cpu_amd_bfloat16")


def rendered(text: str) -> str:
    """The README with every marked table made anew."""

    def table(match):
        name = match[1]
        made = TABLES[name](json.loads((RESULTS / f"{name}.json").read_text()))
        if name in ELSEWHERE:
            before, facts = made.rsplit("`: ", 1)
            made = f"{before} --output=benchmarks/results/{name}.json`: {facts}"
        return f"<!-- {name}.json -->\n{made}\n<!-- end -->"

    return re.sub(r"<!-- (\w+)\.json -->.*?<!-- end -->", table, text, flags=re.DOTALL)


def main() -> None:
    """Rewrite or check."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    old = README.read_text()
    new = rendered(old)
    if arguments.check and new != old:
        sys.exit("README.md differs from its results: run python benchmarks/readme_tables.py")
    if new != old:
        README.write_text(new)


if __name__ == "__main__":
    main()
