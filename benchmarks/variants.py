"""The rows of the ablation: which networks are trained, and in which variants."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from repopt_jax import reparameterize, weight_decay_mask
from repopt_jax.data import Dataset
from repopt_jax.scales import Scales
from repopt_jax.training.devices import make_mesh
from repopt_jax.training.optimizer import REFERENCE_BATCH
from repopt_jax.training.parts import Part, prepare

NETWORKS = {  # sizes of RepOpt-VGG; the first has the depth of B1, the fourth is a narrow A0
    "28 layers": {"num_blocks": (4, 6, 16, 1), "widths": (16, 16, 32, 64, 128)},
    "44 layers": {"num_blocks": (6, 10, 26, 1), "widths": (16, 16, 32, 64, 128)},
    "28 layers, twice as wide": {"num_blocks": (4, 6, 16, 1), "widths": (32, 32, 64, 128, 256)},
    "22 layers of A0": {"num_blocks": (2, 4, 14, 1), "widths": (12, 12, 24, 48, 160)},
    "20 layers": {"num_blocks": (2, 4, 12, 1), "widths": (16, 16, 32, 64, 128)},
    "12 layers": {"num_blocks": (1, 2, 7, 1), "widths": (16, 16, 32, 64, 128)},
    "tiny": {"num_blocks": (1, 1, 1, 1), "widths": (8, 8, 8, 8, 8)},
}


@dataclasses.dataclass(frozen=True)
class Variant:
    """How one row is trained.

    Attributes:
      title: as the tables name it.
      rate: learning rate of a batch of 128 at which its sweep begins.
      part: target, plain or repvgg, see `repopt_jax.training.parts`.
      optimizer: sgd, or one of `OPTIMIZERS`.
      scales: searched, early (after a quarter of the search), initial, ones or averaged.
      identity: where the identity branches start: searched or one.
      initialized: whether the kernels start by the Rule of Initialization.
      multiplied: whether the optimizer works as if on the branches.
    """

    title: str
    rate: float
    part: str = "target"
    optimizer: str = "sgd"
    scales: str = "searched"
    identity: str = "searched"
    initialized: bool = True
    multiplied: bool = True


PLAIN = Variant("plain SGD", 0.1, part="plain")
REPOPTIMIZER = Variant("RepOptimizer", 0.4)
METHOD = (
    PLAIN,
    REPOPTIMIZER,
    Variant("no search", 0.4, scales="initial"),
    Variant("gradient rule only", 0.2, initialized=False),
    Variant("initialization only", 0.2, multiplied=False),
    Variant("RepVGG", 0.2, part="repvgg"),
)
RIVALS = (
    Variant("plain AdamW", 4e-3, part="plain", optimizer="adamw"),
    Variant("plain Muon", 4e-3, part="plain", optimizer="muon"),
    Variant("reparameterize(AdamW)", 4e-3, optimizer="adamw"),
    Variant("reparameterize(Muon)", 4e-3, optimizer="muon"),
)
SCALES = (
    Variant("identity starts at 1", 0.4, identity="one"),
    Variant("a quarter of the search", 0.4, scales="early"),
    Variant("scales all 1", 0.4, scales="ones"),
    Variant("scales averaged per layer", 0.4, scales="averaged"),
)
ROWS = (  # in order of worth
    ("28 layers", METHOD),
    ("44 layers", METHOD),
    ("28 layers, twice as wide", METHOD),
    ("28 layers", RIVALS),
    ("22 layers of A0", (*METHOD, *SCALES)),
    ("20 layers", (PLAIN, REPOPTIMIZER)),
    ("12 layers", (PLAIN, REPOPTIMIZER)),
)
QUICK_ROWS = (("tiny", (*METHOD, *RIVALS, *SCALES)),)


def changed(along: dict[float, Scales], how: str, initial: Scales) -> Scales:
    """The scales of a variant.

    Args:
      along: those of a search, by epoch, ascending; not needed for `initial` and `ones`.
      how: as `Variant.scales` says.
      initial: those with which the search began.
    """
    return {
        "searched": lambda: list(along.values())[-1],
        "early": lambda: next(iter(along.values())),
        "initial": lambda: initial,
        "ones": initial.ones,
        "averaged": lambda: list(along.values())[-1].averaged(),
    }[how]()


def _adamw(schedule: optax.Schedule) -> optax.GradientTransformation:
    return optax.adamw(schedule, weight_decay=0.05, mask=weight_decay_mask)


def _muon(schedule: optax.Schedule) -> optax.GradientTransformation:
    """Muon for the kernels of convolutions as matrices of (window * in, out), AdamW for the rest.

    `consistent_rms` makes steps as large as AdamW's, so that one learning rate serves both.
    """

    def matrices(params):
        axes = optax.contrib.MuonDimensionNumbers((0, 1, 2), 3)
        return jax.tree.map(lambda x: axes if x.ndim == 4 else None, params)

    return optax.contrib.muon(
        schedule,
        weight_decay=0.05,
        weight_decay_mask=weight_decay_mask,
        adam_weight_decay=0.05,
        muon_weight_dimension_numbers=matrices,
        consistent_rms=0.2,
    )


OPTIMIZERS = {"adamw": _adamw, "muon": _muon}


class ScaleByRateState(NamedTuple):
    """The learning rate."""

    rate: jax.Array


def scale_by_rate(rate: float) -> optax.GradientTransformation:
    """Multiply updates by a number of the state, so that all rates of a sweep are one program."""

    def init(params):
        del params
        return ScaleByRateState(jnp.float32(rate))

    def update(updates, state, params=None):
        del params
        return jax.tree.map(lambda u: u * state.rate.astype(u.dtype), updates), state

    return optax.GradientTransformation(init, update)


@dataclasses.dataclass(frozen=True)
class RatedPart(Part):
    """A part whose learning rate is in the optimizer's state.

    Attributes:
      rate: what the schedule, whose highest rate is 1, is multiplied by.
      optimizer: sgd, or one of `OPTIMIZERS`: on the kernels or, `multiplied`, on their branches.
    """

    rate: float = 1.0
    optimizer: str = "sgd"

    @functools.cached_property
    def tx(self) -> optax.GradientTransformation:
        """The optimizer."""
        if self.optimizer == "sgd":
            optimizer = super().tx
        else:
            optimizer = OPTIMIZERS[self.optimizer](self.schedule)
        optimizer = optax.chain(optimizer, scale_by_rate(self.rate))
        if self.optimizer == "sgd" or not self.spec.multiplied:
            return optimizer
        # The kernels are split into branches anew. Which split makes no difference, because these
        # optimizers look at weights only to decay them, all by the same factor.
        return reparameterize(optimizer, self.model.blocks(), self.scales.vectors)


def part_of(
    variant: Variant,
    config: ConfigDict,
    rate: float,
    scales: Scales | None,
    load: Callable[..., Dataset],
) -> Part:
    """The part that a variant trains, with the seed of `config` and the learning rate `rate`."""
    config = config.copy_and_resolve_references()
    config.identity = variant.identity
    config.target.schedule.base_lr = REFERENCE_BATCH / config.target.batch_size  # 1 for the batch
    part = prepare(config, variant.part, make_mesh(), scales, load=load)
    spec = dataclasses.replace(
        part.spec,
        initialized=part.spec.initialized and variant.initialized,
        multiplied=part.spec.multiplied and variant.multiplied,
    )
    fields = {f.name: getattr(part, f.name) for f in dataclasses.fields(part)} | {"spec": spec}
    return RatedPart(**fields, rate=rate, optimizer=variant.optimizer)
