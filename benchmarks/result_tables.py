"""The tables of docs/results.md: a function for each kind of JSON file in benchmarks/results."""

import json
import statistics

from accelerator_table import accelerator
from environment import RESULTS
from markdown_table import markdown, measured_with, over_seeds

# As benchmarks/quantization.py names them, which needs onnx.
NETWORKS = {"repvgg": "RepVGG, folded", "target": "RepOptimizer", "plain": "plain SGD"}


def load(name: str) -> dict:
    """The content of a file of results."""
    return json.loads((RESULTS / f"{name}.json").read_text())


SETTING = ("data", "images", "classes", "epochs", "batch_size")  # of the ablation's trainings
SETS = {"tinyimagenet": "Tiny-ImageNet", "cifar10": "CIFAR-10"}


def ablation_rows(trainings: list[dict]) -> list[dict]:
    """The trainings by network and variant, each at its best learning rate, with all seeds.

    The best is what a sweep has brought to several seeds or, before that, judged the best.

    Returns:
      Rows with network, variant, learning_rate, top1 by seed, images_per_second and device.
    """
    groups: dict[tuple, dict[float, list[dict]]] = {}
    for r in trainings:
        if "top1" in r:
            rates = groups.setdefault((r["network"], r["variant"]), {})
            rates.setdefault(r["learning_rate"], []).append(r)
    found = []
    for (network, variant), rates in groups.items():

        def worth(rate, rates=rates):
            return len(rates[rate]), max(r.get("held_out_top1", 0.0) for r in rates[rate])

        rate = max(rates, key=worth)
        own = sorted(rates[rate], key=lambda r: r["seed"])
        speeds = [r["images_per_second"] for r in own if "images_per_second" in r]
        found.append(
            {
                "network": network,
                "variant": variant,
                "learning_rate": rate,
                "top1": [r["top1"] for r in own],
                "images_per_second": statistics.median(speeds) if speeds else None,
                "device": ", ".join(dict.fromkeys(r["device"] for r in own)),
            }
        )
    return found


def ablation(data: dict, output: str) -> str:
    """For every setting the variants at their best rates, and the sweeps."""
    settings = list(dict.fromkeys(map(_setting, data["rows"])))
    return "\n\n".join(
        _ablation_of(setting, [r for r in data["rows"] if _setting(r) == setting], output)
        for setting in settings
    )


def _setting(row: dict) -> tuple:
    return tuple(row[key] for key in SETTING)


def _ablation_of(setting: tuple, rows: list[dict], output: str) -> str:
    name, images, classes, epochs, batch_size = setting
    table = markdown(
        ("network", "variant", "learning rate", "top-1 %", "seeds", "images/s", "device"),
        [
            (
                r["network"],
                r["variant"],
                f"{r['learning_rate']:g}",
                over_seeds(r["top1"]),
                len(r["top1"]),
                f"{r['images_per_second']:,.0f}" if r["images_per_second"] else "diverged",
                r["device"],
            )
            for r in ablation_rows(rows)
        ],
    )
    tried: dict[tuple, dict[float, float]] = {}
    for r in rows:
        if "held_out_top1" in r:
            rates = tried.setdefault((r["network"], r["variant"]), {})
            rates.setdefault(r["learning_rate"], r["held_out_top1"])
    sweeps = markdown(
        ("network", "variant", "learning rate: top-1 % of held-out images, one seed"),
        [
            (*who, ", ".join(f"{rate:g}: {rates[rate]:.1f}" for rate in sorted(rates)))
            for who, rates in tried.items()
        ],
    )
    facts = dict.fromkeys(f"{r['device']}, jax {r['jax']}, commit {r['commit']}" for r in rows)
    about = (
        f"{SETS[name]}, the first {images:,} training images, those of {classes} classes for the "
        f"search and of {classes} others for the rest, {epochs:g} epochs, batch {batch_size}; "
        f"{'; '.join(facts)}."
    )
    return f"{table}\n\n{sweeps}\n\n{about}"


def small_set(data: dict, output: str) -> str:
    """Single trainings on a GPU."""
    rows = [
        (r["variant"], f"{r['learning_rate']:g}", f"{r['top1']:.1f}", f"{r['images_per_second']:,}")
        for r in sorted(data["variants"], key=lambda r: (r["variant"], r["learning_rate"]))
    ]
    table = markdown(("variant", "learning rate", "top-1 %", "images/s"), rows)
    facts = measured_with(data["environment"], "jax")
    return f"{table}\n\n{data['epochs']} epochs, {data['layers']} layers, one seed; {facts}."


def input_pipeline(data: dict, output: str) -> str:
    """Speeds relative to the official pipeline, by augmentation."""
    augments = list(dict.fromkeys(r["augment"] for r in data["rows"]))
    variants = list(dict.fromkeys(r["variant"] for r in data["rows"]))
    by = {
        (r["variant"], r["augment"]): f"{r['images_per_cpu_second']:.0f} "
        f"({r['times_official_per_cpu_second']:.2f}x)"
        for r in data["rows"]
    }
    table = markdown(
        ("ImageNet images per second of one core", *augments),
        [(v, *(by.get((v, augment), "") for augment in augments)) for v in variants],
    )
    two = [f"{r['variant']} ({r['augment']}) {r['speed_up']:.2f}x" for r in data["two_threads"]]
    threads = f"\n\nTwo threads on two cores against one: {', '.join(two)}." if two else ""
    flags = f"{' --two_threads' if two else ''} --rounds {data['rounds']}{output}"
    command = f"`python benchmarks/input_pipeline.py{flags}`"
    return f"{table}{threads}\n\n{command}: {measured_with(data['environment'])}."


def input_scaling(data: dict, output: str) -> str:
    """Rates of threads and of processes, and the time in which the lock is held."""
    augments = list(dict.fromkeys(r["augment"] for r in data["rows"]))
    by = {
        (r["kind"], r["count"], r["augment"]): f"{r['images_per_second']:,.0f} "
        f"({r['times_one_thread']:.2f}x)"
        for r in data["rows"]
    }
    made_by = list(dict.fromkeys((r["kind"], r["count"]) for r in data["rows"]))
    one = {"threads": "1 thread", "workers": "1 process"}
    many = {"threads": "threads", "workers": "processes"}
    rows = [
        (
            one[kind] if count == 1 else f"{count} {many[kind]}",
            *(by[kind, count, a] for a in augments),
        )
        for kind, count in sorted(made_by)
    ]
    table = markdown(("images per second made by", *augments), rows)
    locks = "; ".join(
        f"{r['augment']} {r['lock_ms']:.2f} of {r['cpu_ms']:.2f} ms ({r['lock_share']:.0%})"
        for r in data["locks"]
    )
    lock = f"CPU time of an image in which a thread holds the interpreter lock: {locks}."
    command = f"`python benchmarks/input_pipeline.py --scaling --rounds {data['rounds']}{output}`"
    return f"{table}\n\n{lock}\n\n{command}: {measured_with(data['environment'])}."


def quantization(data: dict, output: str) -> str:
    """Float, INT8 and spread of the kernels by network."""
    runs = data["runs"]
    networks = [name for name in NETWORKS if any(r["network"] == name for r in runs)]

    def row(title, read, digits=1):
        own = ([read(r) for r in runs if r["network"] == name] for name in networks)
        return title, *(over_seeds(values, digits) for values in own)

    rows = [
        row("float top-1 %", lambda r: r["float"]["top1"]),
        *(
            row(f"INT8 top-1 %, per {setting}", lambda r, s=setting: r["int8"][s]["top1"])
            for setting in runs[0]["int8"]
        ),
        row("kernel standard deviation", lambda r: r["kernels"]["std"], 4),
        row(
            "largest weight by standard deviation, median layer",
            lambda r: r["kernels"]["largest over std"],
        ),
        row(
            "INT8 weights' signal to noise, worst layer (dB)",
            lambda r: r["kernels"]["least SNR dB"],
        ),
        row("INT8 speed-up", lambda r: r["speed-up"], 2),
    ]
    table = markdown(("", *(NETWORKS[name] for name in networks)), rows)
    budget = data["budget"]
    flags = f"--epochs={budget['epochs']:g} --search-epochs={budget['search_epochs']:g}"
    flags += f" '--train-split={budget['train_split']}' '--eval-split={budget['eval_split']}'"
    flags += f" --seeds {' '.join(map(str, sorted({r['seed'] for r in runs})))}{output}"
    facts = measured_with(data["environment"], "onnxruntime")
    return f"{table}\n\n`python benchmarks/quantization.py {flags}`: {facts}."


def runs_of(data: dict, width: int, network: str) -> list[dict]:
    """One network of `quantization_width.py`, by seed."""
    return [r for r in data["runs"] if (r["width"], r["network"]) == (width, network)]


def quantization_width(data: dict, output: str) -> str:
    """Points of top-1 lost to INT8 by width and network."""
    settings = ("tensor, minmax", "tensor, percentile", "channel, minmax")
    rows = []
    for width in sorted({r["width"] for r in data["runs"]}):
        for network, title in NETWORKS.items():
            own = runs_of(data, width, network)
            top1 = over_seeds([r["float"]["top1"] for r in own])
            lost = [over_seeds([r["int8"][s]["drop"] for r in own]) for s in settings]
            deviation = over_seeds([r["kernels"]["std"] for r in own], 4)
            spread = over_seeds([r["kernels"]["largest over std"] for r in own], 0)
            rows.append((f"{width}x, {title}", top1, *lost, deviation, spread))
    header = (
        "width, network", "float top-1 %", "lost per tensor, minmax", "per tensor, percentile",
        "per channel, minmax", "kernel standard deviation", "largest weight by it",
    )  # fmt: skip
    given = data["arguments"]
    seeds = sorted({r["seed"] for r in data["runs"]})
    flags = "" if given["config"] == "digits" else f" --config={given['config']}"
    flags += f" --epochs={given['epochs']:g} --widths {' '.join(map(str, given['widths']))}"
    flags += f" --seeds {' '.join(map(str, seeds))}{output}"
    command = f"`python benchmarks/quantization_width.py{flags}`"
    facts = measured_with(data["environment"], "jax", "onnxruntime")
    count = f"{len(seeds)} seed{'s' * (len(seeds) > 1)}"
    return f"{markdown(header, rows)}\n\n{command}: {facts}, {count}."


def quantization_remedies(data: dict, output: str) -> str:
    """Top-1 in float, after quantization and after training in INT8, by network."""
    measured = ("float", "quantized", "trained in INT8")
    runs = data["runs"]
    rows = []
    for title in dict.fromkeys(r["network"] for r in runs):
        own = [r for r in runs if r["network"] == title]
        rows.append((title, *(over_seeds([r[key] for r in own]) for key in measured)))
    table = markdown(("network", "float top-1 %", "INT8, quantized", "INT8, fine-tuned"), rows)
    given = data["arguments"]
    seeds = sorted({r["seed"] for r in runs})
    flags = f"--width {given['width']} --epochs={given['epochs']:g}"
    flags += f" --qat-epochs={given['qat_epochs']:g} --seeds {' '.join(map(str, seeds))}{output}"
    facts = measured_with(data["environment"], "jax", "onnxruntime")
    command = f"`python benchmarks/quantization_remedies.py {flags}`"
    return f"{table}\n\n{command}: {facts}, {len(seeds)} seed{'s' * (len(seeds) > 1)}."


def setting_name(setting: dict, among: list[dict]) -> str:
    """Model and image size, with the batch where it varies."""
    name = f"{setting['model'].removeprefix('RepOpt-VGG-')}, {setting['size']} px"
    several = len({s["batch"] for s in among}) > 1
    return f"{name}, batch {setting['batch']}" if several else name


def step_time(data: dict, output: str) -> str:
    """Images per second, time by the target's, and compile time of every variant."""
    settings = data["steps"]
    by = [{r["variant"]: r for r in s["rows"]} for s in settings]
    header = ["training step"]
    for setting in settings:
        name = setting_name(setting, settings)
        header += [f"{name}: images/s", "time by the target's", "compile s"]
    rows = []
    for variant in by[0]:
        row = [variant]
        for found in by:
            r = found.get(variant, {})
            row.append(f"{r['images_per_second']:,.1f}" if r else "")
            row.append(f"{r['time_to_target']:.2f}" if r else "")
            row.append(f"{r['compile_seconds']:.1f}" if "compile_seconds" in r else "")
        rows.append(row)
    paragraphs = [markdown(header, rows)]
    if "updates" in data:
        paragraphs.append(
            " ".join(
                f"{u['model'].removeprefix('RepOpt-VGG-')}: the update with multipliers takes "
                f"{u['time']:.3f} of plain SGD's time, compiling {s['compile']['time']:.2f}; the "
                f"multipliers take {100 * u['extra_state_to_parameters']:.3f} % of the parameters' "
                "memory."
                for u, s in zip(data["updates"], settings, strict=True)
            )
        )
    facts = measured_with(data["environment"], "jax", "torch")
    if "rounds" in data:
        flags = f" --rounds {data['rounds']}"
        if settings[0]["dtype"] == "bfloat16":  # torch takes seven times as long: one model
            flags += f" --models {settings[0]['model']} --dtypes bfloat16"
        facts = f"batch {settings[0]['batch']}, {data['rounds']} rounds in turns; {facts}"
        facts = f"`python benchmarks/step_time.py{flags}{output}`: {settings[0]['dtype']}, {facts}"
    else:
        facts = f"{settings[0]['dtype']}; {facts}"
    return "\n\n".join([*paragraphs, f"{facts}."])


TABLES = {
    "accelerator_h100": accelerator,
    "ablation_4_epochs": ablation,
    "ablation_tinyimagenet": ablation,
    "small_set_h100": small_set,
    "input_pipeline": input_pipeline,
    "input_scaling": input_scaling,
    "quantization": quantization,
    "quantization_width": quantization_width,
    "quantization_remedies": quantization_remedies,
    "quantization_width_cifar10": quantization_width,
    "step_time_cpu": step_time,
    "step_time_cpu_amd": step_time,
    "step_time_cpu_amd_bfloat16": step_time,
    "step_time_h100": step_time,
}
# Files that their scripts write without `--output`.
DEFAULT_OUTPUTS = {f.__name__ for f in TABLES.values()} | {"step_time_cpu"}
