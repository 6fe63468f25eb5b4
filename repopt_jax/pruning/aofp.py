"""AOFP: approximated oracle filter pruning, a search for filters to mask (arXiv 1905.04748).

Deviation from the authors' code: a layer is not pruned to nothing (theirs stops with an assertion
when one filter is left; here that one stays).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from repopt_jax.pruning.channels import ChannelGroup, channel_widths, check_names, intercepted

if TYPE_CHECKING:
    from jaxtyping import Array, Bool, Float, Int

    Masks = dict[str, Bool[Array, " channels"]]
    Sums = dict[str, Float[Array, " channels"]]


@dataclasses.dataclass(frozen=True)
class Follower:
    """Where the damage of masking a group is measured.

    Attributes:
      layer: path of a layer that reads the group.
      norm: path of the BatchNorm after it. None: it has none.
      activation: what follows, such as `jax.nn.relu`. None: nothing, as before a shortcut's sum.
    """

    layer: str
    norm: str | None = None
    activation: Callable | None = None


class AofpState(NamedTuple):
    """State of an AOFP search, by name of the group.

    Attributes:
      count: steps so far.
      base_masks: the filters that are left.
      search_sets: those among which a half is sought.
      score_masks: the filters that the follower sees in this step's second look.
      damages: sum of the damages of the steps in which a filter was switched off.
      draws: the number of these steps.
    """

    count: Int[Array, ""]
    base_masks: Masks
    search_sets: Masks
    score_masks: Masks
    damages: Sums
    draws: Sums


@dataclasses.dataclass(frozen=True)
class Aofp:
    """An AOFP search: `init`, and in every step `draw`, `forward` and `update`.

    While the network trains, a random half of a group's search set is switched off for its
    follower alone. With ``y`` the follower's output and ``y'`` that without the half, the damage
    ``|y - y'|^2 / |y|^2`` goes to every filter of the half. After `steps` steps the half with the
    least mean damage is taken. If all its means are below `threshold` it is masked for good and
    the search starts anew among all filters left; else, if it has more than one filter, it is the
    next search set; else the search starts anew.

    No gradient is changed; masked filters get none and decay. `prune_filters` with
    ``state.base_masks`` gives the smaller network, which computes what the masked one does.
    Training stops, in the paper, at the first epoch that ends with few enough multiply-adds.

    Attributes:
      groups: name -> group of channels.
      followers: name of a group to prune -> where its damage is measured.
      steps: steps of one search for a half (the first of a group takes one more).
      threshold: the mean damage below which filters go; the paper's networks take 0.01 to 0.05.
      warm_up: the step in which the first group's search starts; the next ones start
        ``steps // number of groups`` later each.
      seed: of the draws, which are a function of it and the step.

    Raises:
      ValueError: no followers, one of an unknown group or that does not read it, or a number out
        of range.

    >>> from flax import nnx
    >>> model = nnx.Sequential(*(nnx.Linear(4, 4, rngs=nnx.Rngs(i)) for i in range(2)))
    >>> groups = {"hidden": ChannelGroup({"layers/0": None}, ("layers/1",))}
    >>> search = Aofp(groups, {"hidden": Follower("layers/1")}, steps=2, threshold=0.9)
    >>> state = search.init(model)
    >>> for _ in range(3):
    ...     state = search.draw(state)
    ...     outputs, damages = search.forward(state, model, jnp.ones((3, 4)))
    ...     state = search.update(state, damages)
    >>> int(state.search_sets["hidden"].sum()), int(state.base_masks["hidden"].sum())
    (2, 2)

    References:
      Ding et al., `Approximated Oracle Filter Pruning for Destructive CNN Width Optimization
      <https://arxiv.org/abs/1905.04748>`_, ICML 2019
    """

    groups: Mapping[str, ChannelGroup]
    followers: Mapping[str, Follower]
    steps: int
    threshold: float
    warm_up: int = 0
    seed: int = 0

    def __post_init__(self):
        check_names("followers", self.followers, self.groups)
        for name, follower in self.followers.items():
            readers = self.groups[name].readers
            if follower.layer not in readers:
                raise ValueError(
                    f"followers[{name!r}] must be one of the readers {readers}, got "
                    f"{follower.layer!r}"
                )
        if not self.followers:
            raise ValueError("followers must name at least one group, got none")
        if self.threshold <= 0:
            raise ValueError(f"threshold must be positive, got {self.threshold}")
        for argument, least in {"steps": 1, "warm_up": 0}.items():
            if (value := getattr(self, argument)) < least:
                raise ValueError(f"{argument} must be at least {least}, got {value}")

    def init(self, model: nnx.Module) -> AofpState:
        """The state in which all filters are left.

        Raises:
          ValueError: the groups do not fit the network.
        """
        widths = channel_widths(model, self.groups)

        def every(fill, dtype):
            return {name: jnp.full(widths[name], fill, dtype) for name in self.followers}

        masks = (every(True, bool) for _ in range(3))
        return AofpState(jnp.zeros((), jnp.int32), *masks, every(0, float), every(0, float))

    def _elapsed(self, state: AofpState) -> dict[str, Int[Array, ""]]:
        """Steps since each group's search started; negative before."""
        later = self.steps // len(self.followers)
        return {n: state.count - self.warm_up - i * later for i, n in enumerate(self.followers)}

    def draw(self, state: AofpState) -> AofpState:
        """Switch off a random half of every search set, rounded down."""
        key = jax.random.fold_in(jax.random.key(self.seed), state.count)
        keys = jax.random.split(key, len(self.followers))
        score_masks = {}
        for subkey, (name, elapsed) in zip(keys, self._elapsed(state).items(), strict=True):
            search_set, base = state.search_sets[name], state.base_masks[name]
            chance = jnp.where(search_set, jax.random.uniform(subkey, search_set.shape), 2.0)
            off = _ranks(chance) < jnp.where(elapsed >= 0, search_set.sum() // 2, 0)
            score_masks[name] = base & ~off
        return state._replace(score_masks=score_masks)

    def forward(
        self, state: AofpState, model: nnx.Module, *inputs: Array
    ) -> tuple[Array, dict[str, Float[Array, ""]]]:
        """The masked network's outputs, and the damage at every group's follower.

        The follower runs twice, so in training its BatchNorm's running statistics move twice.
        No gradient goes through the damage.

        Args:
          state: after `draw`.
          model: the network. Under jit, the one that is merged inside.
          *inputs: what the network takes.
        """
        damages: dict[str, Array] = {}
        looks, masks = {}, {}
        for name, follower in self.followers.items():
            looks |= _second_look(follower, state.score_masks[name], name, damages)
            masked = functools.partial(_masked, mask=state.base_masks[name])
            masks |= {norm or layer: masked for layer, norm in self.groups[name].layers.items()}
        with intercepted(model, masks), intercepted(model, looks):
            outputs = model(*inputs)
        return outputs, damages

    def update(self, state: AofpState, damages: Mapping[str, Float[Array, ""]]) -> AofpState:
        """Put the damages down to the filters that were off, and decide where a search ends."""
        fields = {name: {} for name in ("base_masks", "search_sets", "damages", "draws")}
        for name, elapsed in self._elapsed(state).items():
            base, search_set = state.base_masks[name], state.search_sets[name]
            off = ~state.score_masks[name]
            total = state.damages[name] + jnp.where(off, damages[name], 0.0)
            draws = state.draws[name] + off
            mean = jnp.where(search_set & (draws > 0), total / jnp.maximum(draws, 1), jnp.inf)
            size = search_set.sum() // 2
            half = _ranks(mean) < size
            harmless = jnp.where(half, mean, 0.0).max() < self.threshold
            ends = (elapsed > 0) & (elapsed % self.steps == 0)
            masked = base & ~(half & harmless & ends)
            narrowed = jnp.where(harmless | (size <= 1), masked, half)
            fields["base_masks"][name] = masked
            fields["search_sets"][name] = jnp.where(ends, narrowed, search_set)
            fields["damages"][name] = jnp.where(ends, 0.0, total)
            fields["draws"][name] = jnp.where(ends, 0.0, draws)
        return state._replace(count=state.count + 1, **fields)


def _ranks(values: Float[Array, " channels"]) -> Int[Array, " channels"]:
    """The place of every entry in ascending order."""
    return jnp.argsort(jnp.argsort(values))


def _mask(x: Array, mask: Bool[Array, " channels"]) -> Array:
    """`x` with channels switched off; in flattened images a channel has several entries."""
    return x * jnp.broadcast_to(jnp.tile(mask, x.shape[-1] // mask.size), x.shape).astype(x.dtype)


def _masked(layer: Callable, x: Array, mask: Bool[Array, " channels"]) -> Array:
    return _mask(layer(x), mask)


def _second_look(
    follower: Follower, mask: Bool[Array, " channels"], name: str, damages: dict[str, Array]
) -> dict[str, Callable]:
    """What to run at a follower's layers so that ``damages[name]`` is measured."""
    second: list[Array] = []

    def at_layer(layer, x):
        y = layer(x)
        second.append(layer(_mask(x, mask)))
        return y if follower.norm is not None else at_norm(jax.nn.identity, y)

    def at_norm(norm, x):
        y, act = norm(x), follower.activation or jax.nn.identity
        whole, part = act(y), act(norm(second.pop()))
        size = jnp.maximum(jnp.square(whole).sum(), jnp.finfo(y.dtype).tiny)
        damages[name] = jax.lax.stop_gradient(jnp.square(whole - part).sum() / size)
        return y

    calls = {follower.layer: at_layer}
    return calls if follower.norm is None else {**calls, follower.norm: at_norm}
