"""Multipliers that no parameter could take are refused, with the parameter's path."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from repopt_jax.branches import BranchMult, check_block

if TYPE_CHECKING:
    from jaxtyping import Array


def is_known(x: Any) -> bool:
    """Whether `x` has a value yet: optax.inject_hyperparams calls factories under jit."""
    return not isinstance(x, jax.core.Tracer)


def check_mult(path: str, mult: Any, rule: str) -> None:
    """Refuse a multiplier that no parameter could take."""
    if isinstance(mult, BranchMult):
        if mult.rule != rule:
            raise ValueError(
                f"grad_mults[{path!r}] must follow the rule {rule!r} here, got {mult.rule!r}"
            )
        arrays = {f"scale of {name}": scale for name, scale in mult.scales.items()}
    else:
        arrays = {"multiplier": mult}
    for what, value in arrays.items():
        if not is_known(value):
            continue
        try:
            array = np.asarray(value)
            finite = np.isfinite(array)
        except TypeError:
            raise ValueError(
                f"grad_mults[{path!r}] must be an array, a BranchMult or None, "
                f"got {type(mult).__name__}"
            ) from None
        if not finite.all():
            raise ValueError(f"grad_mults[{path!r}]: the {what} must be finite, got {array}")
        if what == "multiplier" and (array < 0).any():
            raise ValueError(
                f"grad_mults[{path!r}]: the {what} must not be negative, got {array.min()}"
            )


def check_fits(path: str, mult: Array | BranchMult, shape: tuple[int, ...]) -> None:
    """Refuse a multiplier that does not fit its parameter."""
    if isinstance(mult, BranchMult):
        try:
            check_block(dict(mult.block), shape)
        except ValueError as error:
            raise ValueError(f"grad_mults[{path!r}], {error}") from None
        wrong = {n: s.shape for n, s in mult.scales.items() if s.shape != shape[-1:]}
        if wrong:
            raise ValueError(
                f"grad_mults[{path!r}]: scales must have the shape {shape[-1:]} of the "
                f"parameter's last axis, got {wrong}"
            )
        return
    try:
        fits = np.broadcast_shapes(np.shape(mult), shape) == shape
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"grad_mults[{path!r}] must broadcast against its parameter of shape {shape}, "
            f"got shape {np.shape(mult)}"
        )
