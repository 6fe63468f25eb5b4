"""A part of a run, checked and ready: its network, data, optimizer and steps.

`prepare` does everything that can fail because of the user's input, and trains nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from repopt_jax import data as data_lib
from repopt_jax.branches import grad_mults
from repopt_jax.models import create_model, init_target
from repopt_jax.scales import Scales
from repopt_jax.training.config import PARTS
from repopt_jax.training.devices import samples_per_group, state_shardings
from repopt_jax.training.optimizer import make_optimizer, update_rule
from repopt_jax.training.schedules import make_schedule
from repopt_jax.training.step import StepOptions, TrainState, init_state

if TYPE_CHECKING:
    from ml_collections import ConfigDict

KINDS = {"search": "hs", "plain": "target"}  # all other parts are called as their kind
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float64": jnp.float64}


@dataclasses.dataclass(frozen=True)
class Part:
    """What `loop.train` needs.

    Attributes:
      name: one of `PARTS`.
      config: the whole configuration.
      section: the part's own section of it.
      dataset: images to train on and to evaluate.
      mesh: the devices.
      build: draws the network anew, in training mode.
      graphdef: of that network.
      eval_graphdef: the same in evaluation mode.
      tx: the optimizer.
      schedule: learning rate by update.
      options: of the steps.
      steps_per_epoch: updates per epoch.
      steps: updates in all.
    """

    name: str
    config: ConfigDict
    section: ConfigDict
    dataset: data_lib.Dataset
    mesh: Mesh
    build: Callable[[], nnx.Module]
    graphdef: nnx.GraphDef
    eval_graphdef: nnx.GraphDef
    tx: optax.GradientTransformation
    schedule: optax.Schedule
    options: StepOptions
    steps_per_epoch: int
    steps: int

    def init(self) -> TrainState:
        """The state before the first step, on its devices."""
        _, state = init_state(self.build(), self.tx, ema=self.section.ema_decay > 0)
        return jax.device_put(state, state_shardings(self.mesh, state))

    def steps_in(self, epochs: float) -> int:
        """`epochs` as a number of updates, at least one."""
        return max(1, round(epochs * self.steps_per_epoch))

    def train_batches(self) -> Any:
        """A new iterator over this process's training batches; it can be checkpointed."""
        section = self.section
        return data_lib.train_batches(
            self.dataset,
            batch_size=section.batch_size,
            seed=self.config.seed,
            augment=section.data.augment,
            image_size=section.data.image_size,
            fast=section.data.fast,
            skip_bad=section.data.skip_bad,
            threads=section.data.threads,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    def eval_batches(self) -> Any:
        """This process's evaluation batches, every image once."""
        devices = self.mesh.size
        return data_lib.eval_batches(
            self.dataset,
            batch_size=-(-self.section.eval_batch_size // devices) * devices,
            image_size=self.section.data.image_size,
            resize=self.section.data.eval_resize,
            skip_bad=self.section.data.skip_bad,
            threads=self.section.data.threads,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )


def prepare(config: ConfigDict, name: str, mesh: Mesh, scales: Scales | None = None) -> Part:
    """Check the configuration of a part and make what it needs.

    Args:
      config: the whole configuration.
      name: one of `PARTS`.
      mesh: the devices.
      scales: for "target" and "csla". None: not known yet, and those that a search starts with
        stand in for them.

    Raises:
      ValueError: anything in `config` or `scales` that does not fit.
      FileNotFoundError: the data set is not there.
    """
    section_name = "search" if name == "search" else "target"
    section = config[section_name]
    if not 0 <= section.ema_decay < 1:
        raise ValueError(f"ema_decay must be in [0, 1), got {section.ema_decay}")
    if not 0 <= section.label_smoothing < 1:
        raise ValueError(f"label_smoothing must be in [0, 1), got {section.label_smoothing}")
    for key, value in (("mixup", section.mix.mixup), ("cutmix", section.mix.cutmix)):
        if value < 0:
            raise ValueError(f"mix.{key} must not be negative, got {value}")
    if not 0 <= section.random_erasing <= 1:
        raise ValueError(f"random_erasing must be in [0, 1], got {section.random_erasing}")
    if section.eval_batch_size < 1:
        raise ValueError(f"eval_batch_size must be at least 1, got {section.eval_batch_size}")
    _check_normalization(section)
    group = samples_per_group(section.batch_size, section.accumulation, section.bn_group, mesh)
    if group < 2 and (section.mix.mixup or section.mix.cutmix):
        raise ValueError(
            "mix.mixup and mix.cutmix need BatchNorm groups of at least 2 images, within which "
            f"they mix, got groups of {group}"
        )
    with _told_where(f"{section_name}.data"):
        dataset = data_lib.load_dataset(**_dataset_arguments(section.data))
    steps_per_epoch = data_lib.steps_per_epoch(dataset, section.batch_size)
    with _told_where(f"{section_name}.schedule"):
        schedule = make_schedule(
            batch_size=section.batch_size,
            steps_per_epoch=steps_per_epoch,
            epochs=section.epochs,
            **section.schedule,
        )
    build = builder(config, name, scales, num_classes=dataset.num_classes, bn_group=group)
    model = nnx.eval_shape(build)
    params = nnx.state(model, nnx.Param)
    rule = update_rule(section.optimizer.name)
    if name == "target":
        scales = Scales.initial(model) if scales is None else scales
        mults = grad_mults(params, model.blocks(), scales, rule)
    else:
        mults = jax.tree.map(lambda _: None, params)
    tx = make_optimizer(section.optimizer, schedule, mults, reparameterized=name == "target")
    model.train()
    graphdef = nnx.graphdef(model)
    model.eval()
    draws = section.mix.mixup or section.mix.cutmix or section.random_erasing
    draws = draws or getattr(model, "dropout", 0)
    part = Part(
        name=name,
        config=config,
        section=section,
        dataset=dataset,
        mesh=mesh,
        build=build,
        graphdef=graphdef,
        eval_graphdef=nnx.graphdef(model),
        tx=tx,
        schedule=schedule,
        options=StepOptions(
            mean=tuple(section.data.mean),
            std=tuple(section.data.std),
            dtype=DTYPES[config.dtype],
            label_smoothing=section.label_smoothing,
            accumulation=section.accumulation,
            ema_decay=section.ema_decay,
            group=group,
            mixup=section.mix.mixup,
            cutmix=section.mix.cutmix,
            random_erasing=section.random_erasing,
            seed=config.seed if draws else 0,  # else every seed would compile a program
            remat=config.remat,
        ),
        steps_per_epoch=steps_per_epoch,
        steps=max(1, round(section.epochs * steps_per_epoch)),
    )
    # What the data cannot do is refused now, not after a search.
    part.train_batches()
    part.eval_batches()
    return part


def builder(
    config: ConfigDict, name: str, scales: Scales | None, *, num_classes: int, bn_group: int
) -> Callable[[], nnx.Module]:
    """Check what the configuration says of a part's network; the function that draws it anew.

    Args:
      config: the whole configuration.
      name: one of `PARTS`.
      scales: as for `prepare`.
      num_classes: outputs of the last layer.
      bn_group: samples per BatchNorm group in training.

    Raises:
      ValueError: as `prepare`.
    """
    if name not in PARTS:
        raise ValueError(f"parts must be among {PARTS}, got {name!r}")
    dtype = DTYPES.get(config.dtype)
    if dtype is None:
        raise ValueError(f"dtype must be one of {sorted(DTYPES)}, got {config.dtype!r}")
    if dtype == jnp.float64 and not jax.config.jax_enable_x64:
        raise ValueError("dtype 'float64' needs JAX_ENABLE_X64=1 in the environment")
    if config.identity not in ("searched", "one"):
        raise ValueError(f"identity must be 'searched' or 'one', got {config.identity!r}")
    for key in ("num_blocks", "widths", "strides"):
        value = config.model[key]
        if value is not None and not all(isinstance(n, int) and n > 0 for n in value):
            raise ValueError(f"model.{key} must be whole numbers above 0, got {value}")
    size = {key: value for key, value in config.model.items() if value is not None}
    types = {
        "dtype": dtype,
        "param_dtype": jnp.float64 if dtype == jnp.float64 else jnp.float32,
    }

    def create(kind: str, **options: Any) -> nnx.Module:
        options |= {"num_classes": num_classes, "bn_group": bn_group, **size, **types}
        with _told_where("model"):
            return create_model(kind=kind, **options)

    if name in ("target", "csla"):
        plain = nnx.eval_shape(lambda: create("target", rngs=nnx.Rngs(0)))
        scales = Scales.initial(plain) if scales is None else scales
        scales.check(plain)

    def build() -> nnx.Module:
        # Another generator than JAX's default because it compiles eight times as fast, which
        # for a network of 28 layers is seconds.
        rngs = nnx.Rngs(params=jax.random.key(config.seed, impl="rbg"))
        if name == "csla":
            starts = scales if config.identity == "searched" else _identity_at_one(plain, scales)
            return create("csla", scales=starts, rngs=rngs)
        model = create(KINDS.get(name, name), rngs=rngs)
        if name == "target":
            init_target(model, scales, identity=config.identity, rngs=rngs)
        return model

    return build


def _identity_at_one(model: nnx.Module, scales: Scales) -> dict[str, dict[str, np.ndarray]]:
    blocks = model.blocks()
    return {
        path: {n: v if blocks[path][n].scaled else np.ones_like(v) for n, v in vectors.items()}
        for path, vectors in scales.vectors.items()
    }


@contextlib.contextmanager
def _told_where(place: str) -> Iterator[None]:
    """Several fields are called "name": say in which section the refused one is."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def _check_normalization(section: ConfigDict) -> None:
    for key in ("mean", "std"):
        value = section.data[key]
        good = len(value) == 3 and all(isinstance(x, float | int) for x in value)
        if not good or (key == "std" and min(value) <= 0):
            kind = "numbers above 0" if key == "std" else "numbers"
            raise ValueError(f"data.{key} must be 3 {kind}, one per channel, got {value}")


def _dataset_arguments(section: ConfigDict) -> dict[str, Any]:
    keys = ("name", "data_dir", "train_split", "eval_split", "classes")
    return {key: section[key] for key in keys}
