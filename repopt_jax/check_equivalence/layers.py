"""Every branch type and every preset under every optimizer.

One network holds a layer of every type, so that clipping and other global norms see all of them.
It is trained twice: as a network of branches with the plain optimizer, and as a plain network with
the closed-form multipliers or with `reparameterize`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from flax import nnx

from repopt_jax.branches import (
    Block,
    BlockDiagonal,
    Centre,
    Diagonal,
    Dilated,
    FoldedConv,
    FrozenPointwise,
    Full,
    Identity,
    LowRank,
    presets,
)
from repopt_jax.check_equivalence.training import Method, differences, start
from repopt_jax.transforms import repopt_adamw, repopt_sgd
from repopt_jax.weight_decay import weight_decay_mask

if TYPE_CHECKING:
    from jaxtyping import Array

STEPS = 30
BATCH = 4


@dataclasses.dataclass(frozen=True)
class LayerType:
    """A layer and its branches.

    Attributes:
      layer: class of the layer.
      inputs: shape of a sample.
      options: what the layer is made with, besides ``rngs`` and ``param_dtype``.
      block: its branches; none for a layer that is trained as it is.
    """

    layer: type[nnx.Module]
    inputs: tuple[int, ...]
    options: dict[str, Any]
    block: Block


def _conv(window: tuple[int, ...], block: Block, *, out: int = 4, groups: int = 1) -> LayerType:
    size = {"in_features": 4, "out_features": out, "kernel_size": window}
    options = {**size, "feature_group_count": groups}
    return LayerType(nnx.Conv, (*(5,) * len(window), 4), options, {"full": Full(), **block})


def _preset(rule: Callable[..., Block | None], size: int = 3, groups: int = 1, **options: Any):
    """A square convolution of 4 to 4 channels with the branches of a paper."""
    kind = _conv((size, size), {}, groups=groups)
    layer = nnx.eval_shape(lambda: kind.layer(**kind.options, rngs=nnx.Rngs(0)))
    return dataclasses.replace(kind, block=rule("", layer, **options))


def _dense(block: Block, inputs: int = 6, outputs: int = 6) -> LayerType:
    options = {"in_features": inputs, "out_features": outputs}
    return LayerType(nnx.Linear, (inputs,), options, {"full": Full(), **block})


def _transposed(block: Block) -> LayerType:
    options = {"in_features": 4, "out_features": 2, "kernel_size": (3, 3), "strides": (2, 2)}
    return LayerType(nnx.ConvTranspose, (3, 3, 4), options, {"full": Full(), **block})


LAYERS: dict[str, LayerType] = {
    "RepVGG": _preset(presets.repvgg_branches),
    "ACNet": _preset(presets.acnet_branches),
    "DBB, grouped": _preset(presets.dbb_branches, groups=2),
    "DBB, depthwise": _preset(presets.dbb_branches, groups=4),
    "MobileOne": _preset(presets.mobileone_branches, groups=4),
    "RepLKNet": _preset(presets.replknet_branches, 7, groups=4),
    "RepGhost": _preset(presets.repghost_branches, groups=4),
    "RepMLP": _preset(presets.repmlp_branches, 1, groups=2, image=(1, 2)),
    "dilated 3x3 in 5x5": _conv((5, 5), {"dilated": Dilated(3, 2)}, out=2),
    "grouped identity": _conv((3, 3), {"identity": Identity(groups=2)}, groups=2),
    "1 in 3, one axis": _conv((3,), {"conv1": Centre(1), "identity": Identity()}),
    "1 in 3, three axes": _conv((3, 3, 3), {"conv1": Centre(1)}, out=2),
    "1x1 in transposed 3x3": _transposed({"conv1x1": Centre(1)}),
    "grouped in ordinary": _conv((3, 3), {"grouped": BlockDiagonal(2)}),
    "dense, diagonal": _dense({"diagonal": Diagonal()}),
    "dense, block-diagonal": _dense({"blocks": BlockDiagonal(3)}),
    "dense, identity": _dense({"identity": Identity()}),
    "dense, folded conv": _dense({"conv": FoldedConv((3, 3), (3, 3), groups=2)}, 18, 36),
    "dense, low rank": _dense({"low_rank": LowRank(2)}, outputs=5),
    "dense, frozen first": _dense({"frozen": FrozenPointwise(3)}, outputs=5),
}
WITHOUT_BRANCHES = LayerType(nnx.Linear, (6,), {"in_features": 6, "out_features": 5}, {})

_DECAY = {"weight_decay": 1e-2, "mask": weight_decay_mask}
_decayed = optax.add_decayed_weights(**_DECAY)
METHODS: dict[str, Method] = {
    "multiplier: SGD": Method(
        lambda: optax.chain(_decayed, optax.sgd(0.05, 0.9, nesterov=True)),
        "linear",
        functools.partial(repopt_sgd, 0.05, **_DECAY),
        1e-12,
    ),
    "multiplier: AdamW": Method(
        lambda: optax.adamw(1e-3, **_DECAY),
        "direction",
        functools.partial(repopt_adamw, 1e-3, **_DECAY),
        1e-5,  # AdamW adds an epsilon that is not scale-free
    ),
    "Adam": Method(lambda: optax.adam(1e-3)),
    "AdamW": Method(lambda: optax.adamw(1e-3, **_DECAY)),
    "RMSProp": Method(lambda: optax.rmsprop(1e-3, momentum=0.9)),
    "Adafactor": Method(lambda: optax.adafactor(1e-2, min_dim_size_to_factor=2)),
    "Lion": Method(lambda: optax.lion(1e-3, **_DECAY)),
    "LAMB": Method(lambda: optax.lamb(1e-2, **_DECAY)),
    "LARS": Method(lambda: optax.lars(1.0, 1e-2, weight_decay_mask)),
    "Muon": Method(lambda: optax.contrib.muon(1e-2)),
    "SGD, clipped norm": Method(
        lambda: optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.1, 0.9))
    ),
    "SGD, clip+mask+schedule": Method(
        lambda: optax.chain(
            optax.clip_by_global_norm(0.1),
            _decayed,
            optax.sgd(optax.cosine_decay_schedule(0.1, STEPS), 0.9, nesterov=True),
        )
    ),
}


class Layers(nnx.Module):
    """Layers side by side."""

    def __init__(self, types: Mapping[str, LayerType]):
        # The kernels are set afterwards.
        zeros = nnx.initializers.zeros_init()
        shared = {"param_dtype": jnp.float64, "kernel_init": zeros, "rngs": nnx.Rngs(0)}
        for name, kind in types.items():
            setattr(self, name, kind.layer(**kind.options, **shared))

    def loss(self, batch: Mapping[str, Array]) -> Array:
        """A smooth function of the outputs of all layers."""
        total = jnp.zeros((), jnp.float64)
        for name, x in batch.items():
            y = getattr(self, name)(x)
            wanted = jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)
            total += jnp.square(jnp.tanh(y) - wanted).mean()
        return total


def layer_differences(
    method: Method, types: Mapping[str, LayerType], steps: int = STEPS
) -> dict[str, float]:
    """Largest relative difference of every layer's kernel; needs float64.

    Layers for which the method has no closed form are left out.
    """
    if method.rule == "direction":  # element-wise multipliers only
        types = {n: t for n, t in types.items() if all(b.placement for b in t.block.values())}
    blocks = {name: kind.block for name, kind in types.items()}
    types = {**types, "without branches": WITHOUT_BRANCHES}

    @nnx.jit  # one compilation in place of hundreds
    def started():
        rngs = nnx.Rngs(params=jax.random.key(1, impl="rbg"))  # the quickest to compile
        return start(Layers(types), blocks, mixed=True, rngs=rngs)

    rng = np.random.default_rng(2)
    batches = {name: rng.normal(size=(steps, BATCH, *t.inputs)) for name, t in types.items()}
    found = differences(*started(), method, Layers.loss, batches)
    return {name: found[name] for name in blocks}
