"""Two rows of the README's table: accuracy on digits over several seeds, and exactness.

    python benchmarks/digits_and_equivalence.py        (five minutes on two CPU cores)

Runs `train.py` as the README does, once for every seed, and the networks of
`python -m repopt_jax.check_equivalence`. Writes JSON.
"""

import argparse
import json
import pathlib
import subprocess
import sys

import jax
from environment import REPOSITORY, RESULTS, environment

from repopt_jax.check_equivalence.__main__ import network_rows
from repopt_jax.check_equivalence.networks import STEPS
from repopt_jax.training.report import write_json

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


def digits(seed: int, workdir: pathlib.Path) -> dict[str, float]:
    """Top-1 (percent) by part of one run of `train.py`."""
    command = [sys.executable, str(REPOSITORY / "train.py"), f"--workdir={workdir}"]
    subprocess.run([*command, f"--config.seed={seed}"], check=True)
    parts = json.loads((workdir / "summary.json").read_text())["parts"]
    return {"seed": seed, **{name: part["eval/top1"] for name, part in parts.items()}}


def equivalence() -> list[dict]:
    """The largest difference of a kernel for every network and optimizer, in float64."""
    keys = ("network", "optimizer", "signs", "difference", "bound")
    with jax.enable_x64(True):
        return [dict(zip(keys, row, strict=True)) for row in network_rows(STEPS)]


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/digits_seeds"))
    parser.add_argument(
        "--output", type=pathlib.Path, default=RESULTS / f"{pathlib.Path(__file__).stem}.json"
    )
    flags = parser.parse_args()
    found = {
        "what": __doc__.splitlines()[0],
        "digits": [digits(seed, flags.workdir / f"seed{seed}") for seed in flags.seeds],
        "steps": STEPS,
        "equivalence": equivalence(),
        "environment": environment(*PACKAGES),
    }
    write_json(flags.output, found)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
