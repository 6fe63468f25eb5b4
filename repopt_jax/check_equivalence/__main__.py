"""The command line: prints the table, and exits with status 1 if a case passes its bound."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

import jax

from repopt_jax import check_equivalence
from repopt_jax.check_equivalence import layers, networks


def network_rows(steps: int) -> Iterator[tuple[str, str, str, float, float]]:
    """Network, optimizer, signs of the scales, difference, bound."""
    for case in networks.cases():
        signs = "mixed" if case.mixed else "positive"
        found = networks.difference(case, steps)
        yield case.network, case.optimizer, signs, found, case.bound


def layer_rows(steps: int) -> Iterator[tuple[str, str, str, float, float]]:
    """The same for every branch type under every optimizer."""
    for optimizer, method in layers.METHODS.items():
        for layer, found in layers.layer_differences(method, layers.LAYERS, steps).items():
            yield layer, optimizer, "mixed", found, method.bound


def main(arguments: list[str] | None = None) -> int:
    """Print the table; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m repopt_jax.check_equivalence",
        description=check_equivalence.__doc__.split("\n\n")[1],
    )
    parser.add_argument("--all", action="store_true", help="every branch type and optimizer too")
    parser.add_argument(
        "--steps",
        type=int,
        help=f"default: {networks.STEPS} for networks, {layers.STEPS} for branch types",
    )
    options = parser.parse_args(arguments)
    if options.steps is not None and options.steps < 1:
        parser.error(f"--steps must be at least 1, got {options.steps}")
    row = "{:<24}{:<25}{:<10}{:>12}{:>10}  {}".format
    print(row("network or layer", "optimizer", "scales", "difference", "bound", ""))
    count = failed = 0
    with jax.enable_x64(True):
        rows = [network_rows(options.steps or networks.STEPS)]
        if options.all:
            rows.append(layer_rows(options.steps or layers.STEPS))
        for network, optimizer, signs, found, bound in (case for part in rows for case in part):
            passed = found <= bound  # false for NaN
            count += 1
            failed += not passed
            numbers = (f"{found:.1e}", f"{bound:.0e}", "ok" if passed else "FAILED")
            print(row(network, optimizer, signs, *numbers), flush=True)
    print(f"{failed} of {count} cases failed in float64")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
