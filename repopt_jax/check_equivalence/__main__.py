"""The command line: prints the table; the exit status is 1 if a difference exceeds its bound."""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator

import jax

from repopt_jax import check_equivalence
from repopt_jax.check_equivalence import layers, networks

Row = tuple[str, str, str, float, float]  # network, optimizer, signs of scales, difference, bound


def network_rows(steps: int) -> Iterator[Row]:
    """The published method on networks of RepVGG blocks."""
    for network, optimizer, mixed in networks.cases():
        found = networks.difference(network, optimizer, mixed, steps)
        bound = networks.OPTIMIZERS[optimizer].bound
        yield network, optimizer, "mixed" if mixed else "positive", found, bound


def layer_rows(steps: int) -> Iterator[Row]:
    """Every preset and branch type under every optimizer."""
    for optimizer, method in layers.METHODS.items():
        for layer, found in layers.layer_differences(method, layers.LAYERS, steps).items():
            yield layer, optimizer, "mixed", found, method.bound


def main(arguments: list[str] | None = None) -> int:
    """Print the table and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m repopt_jax.check_equivalence",
        description=check_equivalence.__doc__.split("\n\n")[1],
    )
    parser.add_argument(
        "--all", action="store_true", help="every preset, branch type and optimizer too"
    )
    default = f"default: {networks.STEPS} for networks, {layers.STEPS} for layers"
    parser.add_argument("--steps", type=int, help=default)
    options = parser.parse_args(arguments)
    if options.steps is not None and options.steps < 1:
        parser.error(f"--steps must be at least 1, got {options.steps}")
    row = "{:<24}{:<25}{:<10}{:>12}{:>10}  {}".format
    print(row("network or layer", "optimizer", "scales", "difference", "bound", ""))
    passed = []
    with jax.enable_x64(True):
        rows = network_rows(options.steps or networks.STEPS)
        if options.all:
            rows = itertools.chain(rows, layer_rows(options.steps or layers.STEPS))
        for *names, found, bound in rows:
            passed.append(found <= bound)  # false for NaN
            verdict = "ok" if passed[-1] else "FAILED"
            print(row(*names, f"{found:.1e}", f"{bound:.0e}", verdict), flush=True)
    failed = passed.count(False)
    print(f"{failed} of {len(passed)} cases failed in float64")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
