"""The networks of a run's parts as its configuration describes them, before any training."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from flax import nnx

from repopt_jax.models import create_model, init_target, search_network, start_scales
from repopt_jax.models.create import family_of
from repopt_jax.models.folding import fold
from repopt_jax.models.simulated_int8 import simulate_int8
from repopt_jax.scales import Scales
from repopt_jax.training.config import PARTS, PartSpec
from repopt_jax.tree_paths import errors_at

if TYPE_CHECKING:
    from ml_collections import ConfigDict

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float64": jnp.float64}


def draw_network(
    config: ConfigDict,
    spec: PartSpec,
    scales: Scales | None,
    *,
    num_classes: int,
    bn_group: int,
) -> nnx.Module:
    """The network of a part as it starts, in training mode.

    Args:
      config: the whole configuration.
      spec: of the part.
      scales: used by parts that need them. None: drawn without them, for the shapes alone.
      num_classes: outputs of the last layer.
      bn_group: samples per BatchNorm group in training.

    Raises:
      ValueError: the configuration or the scales do not fit.
    """
    if spec.tunes:
        sizes = {"num_classes": num_classes, "bn_group": bn_group}
        folded = fold(draw_network(config, PARTS[spec.tunes], scales, **sizes))
        return simulate_int8(folded, per_channel=config.qat.per_channel)
    dtype = DTYPES.get(config.dtype)
    if dtype is None:
        raise ValueError(f"dtype must be one of {sorted(DTYPES)}, got {config.dtype!r}")
    if dtype == jnp.float64 and not jax.config.jax_enable_x64:
        raise ValueError("dtype 'float64' needs JAX_ENABLE_X64=1 in the environment")
    # Not JAX's default generator: this one compiles eight times as fast, which saves seconds for a
    # network of 28 layers.
    rngs = nnx.Rngs(params=jax.random.key(config.seed, impl="rbg"))
    options = {key: value for key, value in config.model.items() if value is not None}
    options |= {"num_classes": num_classes, "bn_group": bn_group, "dtype": dtype, "rngs": rngs}
    options["param_dtype"] = jnp.float64 if dtype == jnp.float64 else jnp.float32
    with errors_at("model"):
        if not family_of(config.model.name).classifies:
            raise ValueError(f"name must be of a network with logits, got {config.model.name!r}")
        model = create_model(kind="target" if spec.network == "csla" else spec.network, **options)
    if spec.network == "csla":
        blocks, starts = model.blocks(), None
        if scales is not None:
            scales.check(model)
            with jax.ensure_compile_time_eval():  # checked by their values, also under eval_shape
                starts = start_scales(blocks, scales.vectors, config.identity)
        return search_network(model, blocks, kind="csla", scales=starts, rngs=rngs)
    if spec.initialized and scales is not None:
        init_target(model, scales, identity=config.identity, rngs=rngs)
    return model


def initial_scales(config: ConfigDict) -> Scales:
    """The scales that a search of the network of `config` starts with."""
    draw = functools.partial(draw_network, config, PARTS["plain"], None, num_classes=1, bn_group=1)
    return Scales.initial(nnx.eval_shape(draw))
