"""The README's table: what matters, each row from the file of its study."""

from markdown_table import gpu, machine, over_seeds
from result_tables import ablation_rows, load, runs_of

Row = tuple[str, str, str]  # what, figure, command and machine
ABLATION = "the-ablation-on-tiny-imagenet"


def one_row(rows: list[dict], **wanted) -> dict:
    """The row that has the wanted values."""
    (found,) = (r for r in rows if all(r[k] == v for k, v in wanted.items()))
    return found


def source(command: str, data: dict) -> str:
    """The command and the machine; of a GPU also the commit."""
    environment = data["environment"]
    changed = " with changes" if environment["uncommitted_changes"] else ""
    commit = f", commit {environment['commit']}{changed}" if gpu(environment) else ""
    return f"{command}; {machine(environment)}{commit}"


def accuracy() -> list[Row]:
    """RepOptimizer against plain training and RepVGG, by data set."""
    digits = load("digits_and_equivalence")
    by_part = {p: over_seeds([run[p] for run in digits["digits"]]) for p in ("target", "plain")}
    trainings = load("ablation_tinyimagenet")["rows"]
    rows = ablation_rows([r for r in trainings if r["classes"] == 100])
    variants = ("RepOptimizer", "plain SGD", "RepVGG")
    found = [one_row(rows, variant=v, network="28 layers") for v in variants]
    return [
        (
            "digits, 28 layers, 20 epochs, top-1 %: RepOptimizer against plain SGD",
            f"{by_part['target']} against {by_part['plain']}",
            source("`python benchmarks/digits_and_equivalence.py`", digits),
        ),
        (
            "Tiny-ImageNet, 100 classes, 28 layers, 30 epochs: RepOptimizer / plain SGD / RepVGG "
            "(one seed)",
            " / ".join(over_seeds(row["top1"]) for row in found),
            f"[the ablation](docs/results.md#{ABLATION}); {found[0]['device']}",
        ),
    ]


def long_training() -> Row:
    """The best of the learning rates tried, of one seed."""
    data = load("small_set_h100")

    def best(variant):
        return f"{max(r['top1'] for r in data['variants'] if r['variant'] == variant):.1f}"

    variants = ("RepOptimizer (SGD)", "plain SGD", "RepVGG (BatchNorm in every branch)")
    return (
        f"half of CIFAR-10, 28 layers, {data['epochs']} epochs, one seed: the same",
        " / ".join(map(best, variants)),
        source("[a short script](docs/results.md#long-training-on-a-gpu)", data),
    )


def exactness() -> Row:
    """How far GR is from training the branches."""
    data = load("digits_and_equivalence")

    def largest(optimizer):
        own = (r for r in data["equivalence"] if r["optimizer"].startswith(optimizer))
        return f"{max(r['difference'] for r in own):.1e}"

    return (
        f"GR against training the branches, {data['steps']} steps in float64, largest relative "
        "difference of a kernel: SGD; AdamW",
        f"{largest('SGD')}; {largest('AdamW')}",
        source("`python -m repopt_jax.check_equivalence`", data),
    )


def cost() -> list[Row]:
    """What GR adds to plain SGD, and the training step against PyTorch's and RepVGG's."""
    cpu, gpu_data = load("step_time_cpu"), load("accelerator_h100")
    update = one_row(cpu["updates"], model="RepOpt-VGG-B1")["time"]

    def step(variant):
        return one_row(gpu_data["rows"], section="steps", name=f"B1, batch 256: {variant}")

    times = (step(v)["milliseconds"] for v in ("target", "target, plain SGD"))
    rates = (step(v)["images_per_second"] for v in ("target", "torch, compiled", "repvgg"))
    command, on_gpu = "`python benchmarks/step_time.py`", "`python benchmarks/accelerator.py`"
    on_gpu = source(on_gpu, gpu_data)
    return [
        (
            "time with GR by plain SGD's, B1: the update on CPU; the whole step on GPU",
            f"{update:.2f}; {next(times) / next(times):.2f}",
            f"{source(command, cpu)}; {on_gpu}",
        ),
        (
            "images/s of B1's training, 224 px, batch 256: ours / compiled PyTorch / RepVGG",
            " / ".join(f"{rate:,.0f}" for rate in rates),
            on_gpu,
        ),
    ]


def int8() -> Row:
    """Accuracy lost to INT8 by wide networks."""
    data = load("quantization_width")

    def lost(network):
        runs = runs_of(data, 4, network)
        return over_seeds([r["int8"]["tensor, minmax"]["drop"] for r in runs])

    return (
        "points of top-1 lost to INT8, one scale per tensor, digits, 64 to 256 channels: "
        "RepOptimizer against RepVGG",
        f"{lost('target')} against {lost('repvgg')}",
        source("`python benchmarks/quantization_width.py`", data),
    )


def summary() -> str:
    """All rows; of ImageNet what the authors published."""
    published = "not run; published: B1 78.62, B2 79.68, L1 79.82, L2 80.47 %"
    rows = [
        ("what", "figure", "command; machine"),
        ("---",) * 3,
        *accuracy(),
        long_training(),
        exactness(),
        *cost(),
        int8(),
        ("ImageNet, top-1", published, "`python train.py --config=configs/imagenet.py`"),
    ]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
