"""Sizes and numbers that no network has, refused before they cost time or mean something else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from repopt_jax.branches import is_known
from repopt_jax.messages import listed, quote

MAX_WIDTH = 1 << 20  # channels of a layer, or classes
MAX_BLOCKS = 128  # of a stage


def check_sizes(*, least: int = 1, **sizes: tuple[Sequence[int], int, int]) -> None:
    """Refuse sizes that no network has, given as ``name=(sizes, their number, the largest)``.

    A file may state any, and a network of absurd ones takes hours to build.

    Args:
      least: the smallest size.
      **sizes: by the name of the argument.

    >>> check_sizes(strides=((2, 2, 0), 3, 64))
    Traceback (most recent call last):
    ValueError: strides must be 3 whole numbers from 1 to 64, got (2, 2, 0)
    """
    for name, (found, length, largest) in sizes.items():
        found = (found,) if length == 1 or not isinstance(found, Sequence) else tuple(found)
        whole = all(isinstance(n, (int, np.integer)) and not isinstance(n, bool) for n in found)
        if len(found) != length or not whole or not all(least <= n <= largest for n in found):
            some = f"{length} whole numbers" if length > 1 else "a whole number"
            shown = f"({listed(map(quote, found), ', ')})" if length > 1 else quote(found[0])
            raise ValueError(f"{name} must be {some} from {least} to {largest}, got {shown}")


def check_rngs(rngs: Any) -> None:
    """Refuse a seed or a key in place of Flax's generators.

    >>> check_rngs(0)
    Traceback (most recent call last):
    ValueError: rngs must draw parameters, as nnx.Rngs(0) does, got 0
    """
    if not callable(getattr(rngs, "params", None)):
        raise ValueError(f"rngs must draw parameters, as nnx.Rngs(0) does, got {quote(rngs)}")


def bad_numbers(value: np.ndarray, *, variance: bool) -> str | None:
    """What is wrong with the numbers of a variable, which no trained network has; None: nothing.

    >>> bad_numbers(np.array([1.0, np.inf]), variance=False)
    'must be finite, got NaN or infinity'
    >>> bad_numbers(np.array([1.0, -2.0]), variance=True)
    'must not be negative, got -2.0'
    """
    if not np.isfinite(value).all():
        return "must be finite, got NaN or infinity"
    if variance and (value < 0).any():
        return f"must not be negative, got {value.min()}"
    return None


def check_numbers(model: nnx.Module) -> None:
    """Refuse a network with numbers that no trained one has, whose outputs would mean nothing.

    Variables that are shapes only, or that `jax` traces, are passed over.

    Raises:
      ValueError: the first variables with NaN or infinity or with a negative variance, by path.

    >>> from repopt_jax.models.layers import BatchNorm
    >>> bn = BatchNorm(2)
    >>> bn.var[...] = bn.var[...].at[0].set(-1)
    >>> check_numbers(bn)
    Traceback (most recent call last):
    ValueError: model must have finite numbers: var must not be negative, got -1.0
    """
    problems = []
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        value = variable.get_value()
        if isinstance(value, jax.ShapeDtypeStruct) or not is_known(value):
            continue
        if not jnp.issubdtype(value.dtype, jnp.inexact):  # random keys, counts
            continue
        variance = isinstance(variable, nnx.BatchStat) and path[-1] == "var"
        if problem := bad_numbers(np.asarray(value), variance=variance):
            problems.append(f"{'/'.join(map(str, path))} {problem}")
    if problems:
        raise ValueError(f"model must have finite numbers: {listed(problems)}")
