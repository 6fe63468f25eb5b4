"""Gradient re-parameterization (GR) as Optax transformations.

Method: RepOptimizers, arXiv 2205.15242, section 3.2. A merged kernel trained with its gradient
multiplied by constants follows the training of the branches it stands for. Where the
multiplication belongs depends on the update rule:

* linear in the gradient (SGD, momentum, Nesterov, coupled weight decay): first of the chain,
  with rule "linear" multipliers ``sum_b s_b^2 E_b(1)``;
* the gradient's direction only (Adam, Lion, ... with decoupled decay): right after the
  preconditioner, with rule "direction" multipliers ``sum_b |s_b| E_b(1)``.

Clipping the gradient of the merged kernel, or norms over it (LARS, LAMB), break the equivalence.

Deviation from the authors' code, which multiplies Adam's gradient and update by the signed sum of
scales: there, kernels whose scales have mixed signs drift from the branches; here they do not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import serialization

from repopt_jax.branches import RULES, BranchMult, is_known, placed_like, replicated_like, wide_type
from repopt_jax.tree_paths import by_path, check_updates, errors_at, path_str

if TYPE_CHECKING:
    from jaxtyping import Array, DTypeLike, PyTree


def _is_mult_leaf(x: Any) -> bool:
    return x is None or isinstance(x, BranchMult)


def _is_masked(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)


def _is_absent(x: Any) -> bool:
    return x is None or _is_masked(x)


def _is_complex_pair(x: Any) -> bool:
    """Whether `optax.contrib.split_real_and_imaginary` has put `x` in place of a complex array."""
    return getattr(x, "_fields", ()) == ("real", "imaginary")


def _is_param(x: Any) -> bool:
    return _is_absent(x) or _is_complex_pair(x)


def _multiply(mult: Array | BranchMult, update: Any) -> Any:
    if _is_complex_pair(update):
        return type(update)(*(_multiply(mult, part) for part in update))
    if isinstance(mult, BranchMult):
        return mult(update)
    dtype = wide_type(update.dtype)  # half precision holds neither the multiplier nor the product
    wide = jnp.broadcast_to(mult, update.shape).astype(dtype)
    return (update.astype(dtype) * wide).astype(update.dtype)


def _placed(mult: Array | BranchMult, param: Any) -> Array | BranchMult:
    """A copy on the devices of `param`, if there is one; empty arrays if it is hidden."""
    if _is_absent(param):  # empty, because a state has one structure whatever wrappers hide
        return jax.tree.map(lambda x: jnp.zeros(0, jnp.result_type(x)), mult)
    if not hasattr(param, "shape"):
        return jax.tree.map(jnp.array, mult)
    place = replicated_like if isinstance(mult, BranchMult) else placed_like
    return jax.tree.map(lambda x: place(x, param), mult)


def _check_values(mult: Any, rule: str) -> None:
    """Refuse a multiplier that no parameter could take."""
    if isinstance(mult, BranchMult):
        mult.check(rule)
    elif is_known(mult):
        try:
            array = np.asarray(mult)
            good = np.isfinite(array) & (array >= 0)
        except TypeError:
            raise ValueError(
                f"a multiplier must be an array, a BranchMult or None, got a {type(mult).__name__}"
            ) from None
        if not good.all():
            raise ValueError(f"a multiplier must be finite and at least 0, got {array[~good][0]}")


def _check_shape(mult: Array | BranchMult, shape: tuple[int, ...]) -> None:
    """Refuse a multiplier that does not fit its parameter of `shape`."""
    if isinstance(mult, BranchMult):
        return mult.check_fits(shape)
    try:
        fits = np.broadcast_shapes(np.shape(mult), shape) == shape
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"a multiplier must broadcast against its parameter of shape {shape}, got shape "
            f"{np.shape(mult)}"
        )


def _check_paths(given: dict[str, Any], shown: dict[str, Any]) -> None:
    """Refuse multipliers that have not the paths of the parameters; None may be a whole subtree."""
    if given.keys() == {""} and shown and "" not in shown:
        raise ValueError(f"grad_mults must be a tree like the parameters, got {given['']!r} alone")
    left_alone = tuple(f"{path}/" for path, mult in given.items() if mult is None)
    missing = [
        path
        for path in shown.keys() - given.keys()
        if not (_is_absent(shown[path]) or path.startswith(left_alone))
    ]
    parents = {path[:i] for path in shown for i, mark in enumerate(path) if mark == "/"}
    surplus = [p for p in given.keys() - shown.keys() if given[p] is not None or p not in parents]
    # Wrappers may hide parameters; optax.tree.map_params shows none at all.
    complete = shown and not any(map(_is_masked, shown.values()))
    if missing or (surplus and complete):
        raise ValueError(
            "grad_mults must have the paths of the parameters (None: leave alone); "
            f"missing: {sorted(missing) or 'none'}, surplus: {sorted(surplus) or 'none'}"
        )


class ScaleByGradMultState(NamedTuple):
    """State of `scale_by_grad_mult`: the constants, by path of their parameter."""

    grad_mults: dict[str, Array | BranchMult]


serialization.register_serialization_state(
    BranchMult,
    lambda mult: dict(mult.scales),
    lambda mult, state: dataclasses.replace(
        mult, scales=serialization.from_state_dict(mult.scales, state)
    ),
)


def scale_by_grad_mult(
    grad_mults: PyTree, *, rule: Literal["linear", "direction", "mean"] = "linear"
) -> optax.GradientTransformationExtraArgs:
    """Multiply every parameter's update by its constant multiplier.

    ``u <- M * u`` with ``M`` from `grad_mults`: element by element for arrays, and as
    `BranchMult` defines it for compact multipliers.

    The constants are kept in the state, and no update changes them. They reach a jitted step as
    arguments, and are sharded, checkpointed and restored with the rest of the optimizer's state.

    Args:
      grad_mults: a tree with the parameters' paths. Each leaf is an array that broadcasts against
        its parameter, a `BranchMult`, or None to leave alone the updates of a parameter or of a
        whole subtree. Only paths count: a nested dict fits an `nnx.State` with the same names.
        Multipliers of parameters that `optax.masked` or `optax.partition` hides are not kept.
      rule: which rule the `BranchMult` leaves must follow: "linear" as the first of a chain
        (SGD), "direction" after a preconditioner (Adam), "mean" before one that adds an epsilon.
        Arrays are taken as they are.

    Returns:
      An optax.GradientTransformationExtraArgs.

    Raises:
      ValueError: here, for an unknown rule, a multiplier that is not finite, is negative, or is a
        `BranchMult` of another rule; by ``init``, for a tree or shape that does not match the
        parameters; by ``update``, for updates of other shapes than the parameters, where these
        are given.

    >>> import jax.numpy as jnp, optax, repopt_jax
    >>> params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    >>> tx = repopt_jax.scale_by_grad_mult({"kernel": jnp.array([[1.0, 4.0]]), "bias": None})
    >>> updates, state = tx.update(params, tx.init(params))
    >>> updates["kernel"].tolist(), updates["bias"].tolist()
    ([[1.0, 4.0], [1.0, 4.0]], [1.0, 1.0])

    References:
      Ding et al., `Re-parameterizing Your Optimizers rather than Architectures
      <https://arxiv.org/abs/2205.15242>`_, ICLR 2023, section 3.2
    """
    if rule not in RULES:
        raise ValueError(f"rule must be one of {RULES}, got {rule!r}")
    given = by_path(grad_mults, is_leaf=_is_mult_leaf)
    mults = {path: mult for path, mult in given.items() if mult is not None}
    for path, mult in mults.items():
        with errors_at(f"grad_mults[{path!r}]"):
            _check_values(mult, rule)

    def init_fn(params):
        # None stands for an absent parameter, such as the bias of an Equinox layer without one.
        shown = by_path(params, is_leaf=_is_param)
        _check_paths(given, shown)
        for path, mult in mults.items():
            if path in shown and not _is_absent(shown[path]):
                with errors_at(f"grad_mults[{path!r}]"):
                    param = shown[path]
                    _check_shape(mult, jnp.shape(param.real if _is_complex_pair(param) else param))
        # Copies, because a step that donates the state deletes its arrays. Who shows no parameter
        # is optax.tree.map_params, which asks for the structure of the state.
        hidden = None if shown else ()
        return ScaleByGradMultState(
            {path: _placed(m, shown.get(path, hidden)) for path, m in mults.items()}
        )

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        check_updates(updates, params)

        def scale(path, update):
            mult = state.grad_mults.get(path_str(path))
            return update if mult is None or _is_absent(update) else _multiply(mult, update)

        scaled = jax.tree_util.tree_map_with_path(scale, updates, is_leaf=_is_param)
        return scaled, state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _check_decay(weight_decay: optax.ScalarOrSchedule) -> None:
    if is_known(weight_decay) and not callable(weight_decay) and weight_decay < 0:
        raise ValueError(f"weight_decay must not be negative, got {weight_decay}")


def repopt_sgd(
    learning_rate: optax.ScalarOrSchedule,
    grad_mults: PyTree,
    *,
    momentum: float | None = 0.9,
    nesterov: bool = True,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: PyTree | Callable[[PyTree], PyTree] | None = None,
    accumulator_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""SGD on re-parameterized gradients: exact for momentum, Nesterov and coupled decay.

    With gradient ``g``, multiplier ``M`` (`grad_mults`), decay ``λ`` (`weight_decay`), momentum
    ``μ`` (`momentum`) and learning rate ``η`` (`learning_rate`)::

        d = M * g + λ * w
        m <- μ * m + d
        w <- w - η * (d + μ * m  if nesterov else  m)

    The order is that of the equation: a decay or momentum before the multiplication would be
    multiplied too, which no network of branches does.

    Args:
      learning_rate: a float or a schedule.
      grad_mults: see `scale_by_grad_mult`; `BranchMult` leaves follow the rule "linear".
      momentum: ``μ``, in [0, 1). None: no momentum and no memory for it.
      nesterov: whether to look ahead along the momentum.
      weight_decay: ``λ``, coupled: it goes through momentum and learning rate. A float or a
        schedule.
      mask: what to decay, as a tree of bools or a function of the parameters such as
        `weight_decay_mask`. None: every parameter.
      accumulator_dtype: of ``m``. None: that of the parameters.

    Raises:
      ValueError: momentum or weight decay out of range, or as `scale_by_grad_mult` does.

    >>> import jax.numpy as jnp, optax, repopt_jax
    >>> params = {"w": jnp.array([1.0, 1.0])}
    >>> tx = repopt_jax.repopt_sgd(0.1, {"w": jnp.array([1.0, 4.0])}, momentum=0.0)
    >>> updates, state = tx.update({"w": jnp.ones(2)}, tx.init(params), params)
    >>> [round(float(w), 3) for w in optax.apply_updates(params, updates)["w"]]
    [0.9, 0.6]
    """
    if momentum is not None and is_known(momentum) and not 0 <= momentum < 1:
        raise ValueError(f"momentum must be in [0, 1) or None, got {momentum}")
    _check_decay(weight_decay)
    return optax.chain(
        scale_by_grad_mult(grad_mults),
        optax.add_decayed_weights(weight_decay, mask),
        optax.identity()
        if momentum is None
        else optax.trace(momentum, nesterov, accumulator_dtype),
        optax.scale_by_learning_rate(learning_rate),
    )


def repopt_adamw(
    learning_rate: optax.ScalarOrSchedule,
    grad_mults: PyTree,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    eps_root: float = 0.0,
    mu_dtype: DTypeLike | None = None,
    weight_decay: optax.ScalarOrSchedule = 1e-2,
    mask: PyTree | Callable[[PyTree], PyTree] | None = None,
) -> optax.GradientTransformationExtraArgs:
    """AdamW on re-parameterized updates: exact but for `eps` where several branches meet.

    With multiplier ``M = sum_b |s_b|`` (`grad_mults`), ``N`` the number of branches that reach an
    entry, Adam's direction ``a`` (`b1`, `b2`, `eps`), decay ``λ`` (`weight_decay`) and learning
    rate ``η`` (`learning_rate`)::

        a = adam(M / N * g)
        w <- w - η * (M * a + λ * w)

    Adam divides every branch's gradient ``s_b E_b^T(G)`` by its own size, which removes ``|s_b|``
    but keeps its sign. So each branch moves by ``sign(s_b)`` times one common direction, and the
    kernel by ``s_b sign(s_b) = |s_b|`` times it. Only `eps` sees the size: ``M / N`` gives it the
    effect it has in the branches, exactly where one branch reaches an entry and to first order in
    `eps` where several do.

    Args:
      learning_rate: a float or a schedule.
      grad_mults: see `scale_by_grad_mult`; `BranchMult` leaves follow the rule "direction". For
        arrays, whose branches are unknown, ``M / N`` is 1.
      b1: decay rate of the first moment.
      b2: decay rate of the second moment.
      eps: added to the root of the second moment.
      eps_root: added to the second moment before its root is taken.
      mu_dtype: of the first moment. None: that of the parameters.
      weight_decay: ``λ``, decoupled; a float or a schedule. The default is torch's; that of
        `optax.adamw` is 1e-4.
      mask: what to decay, as in `repopt_sgd`. None: every parameter.

    Raises:
      ValueError: negative weight decay, or as `scale_by_grad_mult` does.

    >>> import jax.numpy as jnp, optax, repopt_jax
    >>> params = {"w": jnp.array([1.0, 1.0])}
    >>> tx = repopt_jax.repopt_adamw(0.1, {"w": jnp.array([1.0, 2.0])}, weight_decay=0.0)
    >>> updates, state = tx.update({"w": jnp.ones(2)}, tx.init(params), params)
    >>> [round(float(w), 3) for w in optax.apply_updates(params, updates)["w"]]
    [0.9, 0.8]
    """
    _check_decay(weight_decay)
    direction = scale_by_grad_mult(grad_mults, rule="direction")
    means = jax.tree.map(
        lambda m: dataclasses.replace(m, rule="mean") if isinstance(m, BranchMult) else None,
        grad_mults,
        is_leaf=_is_mult_leaf,
    )
    return optax.chain(
        scale_by_grad_mult(means, rule="mean"),
        optax.scale_by_adam(b1, b2, eps, eps_root, mu_dtype),
        direction,
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )
