"""A part of a run, checked and ready to start: its network, data, optimizer and steps.

`prepare` does everything that can fail because of the user's input, and trains nothing. A part
that needs scales can be prepared before they are known: it gets them by `Part.with_scales`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import optax
from flax import nnx
from jax.sharding import Mesh

from repopt_jax import data as data_lib
from repopt_jax.branches import Block, grad_mults
from repopt_jax.models import searched_scales
from repopt_jax.models.create import family_of
from repopt_jax.models.simulated_int8 import simulate_int8
from repopt_jax.scales import Scales
from repopt_jax.training.config import PARTS, PartSpec, check_config, check_section, part_section
from repopt_jax.training.device_images import belongs_on_device, put_images
from repopt_jax.training.devices import replicate, samples_per_group, state_shardings
from repopt_jax.training.networks import DTYPES, draw_network, initial_scales
from repopt_jax.training.optimizer import make_optimizer, make_schedule, steps_in, update_rule
from repopt_jax.training.step import StepOptions, TrainState, init_state
from repopt_jax.tree_paths import errors_at

if TYPE_CHECKING:
    from ml_collections import ConfigDict


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of a run: everything that `loop.train` needs.

    Attributes:
      name: a key of `PARTS`.
      spec: what the part trains, and how.
      config: the whole configuration.
      dataset: images to train on and to evaluate.
      mesh: the devices.
      model: the network's shapes; it has no numbers.
      graphdef: of the network in training mode.
      schedule: learning rate by update.
      options: of the steps.
      steps_per_epoch: updates per epoch.
      on_device: whether the images lie on the devices.
      scales: what the part starts and multiplies with. None: not known yet, or not needed.
      trained: the folded network that quantization-aware training begins with. None: not known
        yet, or not needed; the part is then drawn anew.
    """

    name: str
    spec: PartSpec
    config: ConfigDict
    dataset: data_lib.Dataset
    mesh: Mesh
    model: nnx.Module
    graphdef: nnx.GraphDef
    schedule: optax.Schedule
    options: StepOptions
    steps_per_epoch: int
    on_device: bool
    scales: Scales | None = None
    trained: nnx.Module | None = None

    @functools.cached_property
    def section(self) -> ConfigDict:
        """The part's own section of the configuration."""
        return part_section(self.config, self.spec)

    @property
    def steps(self) -> int:
        """Updates in all."""
        return self.steps_in(self.section.epochs)

    def steps_in(self, epochs: float) -> int:
        """`epochs` as a number of updates, at least one."""
        return steps_in(epochs, self.steps_per_epoch)

    def with_scales(self, scales: Scales | None) -> Part:
        """The same part, to be started with `scales`; itself if it needs none.

        Raises:
          ValueError: the part needs scales, and `scales` is None.
        """
        if not self.spec.needs_scales:
            return self
        if scales is None:
            raise ValueError(f"scales must be given for the part {self.name!r}, got None")
        return dataclasses.replace(self, scales=scales)

    def build(self) -> nnx.Module:
        """The network as it starts, in training mode.

        Raises:
          ValueError: the part needs scales and has none, or they do not fit the network.
        """
        if self.trained is not None:
            return simulate_int8(self.trained, per_channel=self.config.qat.per_channel)
        return draw_network(
            self.config,
            self.spec,
            self.with_scales(self.scales).scales,
            num_classes=self.dataset.num_classes,
            bn_group=self.options.group,
        )

    @property
    def blocks(self) -> dict[str, Block]:
        """Path of a layer -> its branches; a folded network's are those from before folding."""
        if not self.spec.tunes:
            return self.model.blocks()
        tuned = functools.partial(draw_network, self.config, PARTS[self.spec.tunes], None)
        return nnx.eval_shape(lambda: tuned(num_classes=1, bn_group=1)).blocks()

    @functools.cached_property
    def tx(self) -> optax.GradientTransformation:
        """The optimizer; its state, once initialized, holds the multipliers."""
        params = nnx.state(self.model, nnx.Param)
        mults = jax.tree.map(lambda _: None, params)
        if self.spec.multiplied:
            rule = update_rule(self.section.optimizer.name)
            scales = self.with_scales(self.scales).scales
            mults = grad_mults(params, self.blocks, scales, rule)
        return make_optimizer(self.section.optimizer, self.schedule, mults)

    def init(self) -> TrainState:
        """The state before the first step, on its devices."""
        _, state = init_state(self.build(), self.tx, ema=self.section.ema_decay > 0)
        return jax.device_put(state, state_shardings(self.mesh, state))

    def train_batches(self, images: bool = True) -> Any:
        """A new iterator over this process's training batches; it can be checkpointed.

        Without `images`, over what is drawn for them, see `repopt_jax.data.train_batches`.
        """
        data = self.section.data
        place = "host" if self.mesh.devices.flat[0].platform == "cpu" else "device"
        return data_lib.train_batches(
            self.dataset,
            batch_size=self.section.batch_size,
            seed=self.config.seed,
            augment=data.augment,
            fast=data.fast,
            images=images,
            augment_on=place if data.augment_on == "auto" else data.augment_on,
            **self._reading(),
        )

    @functools.cached_property
    def eval_batches(self) -> Any:
        """This process's evaluation batches, every image once; kept with its worker processes."""
        devices = self.mesh.size
        return data_lib.eval_batches(
            self.dataset,
            batch_size=-(-self.section.eval_batch_size // devices) * devices,
            resize=self.section.data.eval_resize,
            images=not self.on_device,
            **self._reading(),
        )

    @functools.cached_property
    def eval_images(self) -> dict[str, jax.Array]:
        """The evaluation images and their labels on the devices."""
        return put_images(self.mesh, self.dataset.eval)

    def _reading(self) -> dict[str, Any]:
        keys = ("image_size", "skip_bad", "threads", "workers")
        fields = {key: self.section.data[key] for key in keys}
        places = {"process_index": jax.process_index(), "process_count": jax.process_count()}
        return fields | places

    def scales_of(self, state: TrainState, step: int, measured: dict[str, Any]) -> Scales:
        """The scales of a search in training, with where they come from as metadata.

        Args:
          state: of the search, on any devices.
          step: number of updates done.
          measured: has ``eval/top1``.
        """
        model = nnx.merge(self.graphdef, *replicate(self.mesh, (state.params, state.stats)))
        metadata = {
            "model": self.config.model.name,
            "source": "search",
            "dataset": self.dataset.name,
            "epochs": f"{step / self.steps_per_epoch:g}",
            "top1": f"{measured['eval/top1']:.2f}",
        }
        return searched_scales(model, metadata)


def prepare_parts(
    config: ConfigDict, names: Sequence[str], mesh: Mesh, scales: Scales | None = None
) -> dict[str, Part]:
    """`prepare` every part; those with the same data share one loaded data set."""
    load = functools.cache(data_lib.load_dataset)
    return {name: prepare(config, name, mesh, scales, load=load) for name in names}


def prepare(
    config: ConfigDict,
    name: str,
    mesh: Mesh,
    scales: Scales | None = None,
    *,
    load: Callable[..., data_lib.Dataset] = data_lib.load_dataset,
) -> Part:
    """Check the configuration of a part and make what it needs.

    Args:
      config: the whole configuration.
      name: a key of `PARTS`.
      mesh: the devices.
      scales: used by parts that need them. None: not known yet; the part is checked with those
        that a search starts with, and gets its own by `Part.with_scales`.
      load: loads a data set by the arguments of `load_dataset`.

    Raises:
      ValueError: anything in `config` or `scales` that does not fit.
      FileNotFoundError: the data set is not there.
    """
    check_config(config)
    spec = PARTS[name]
    section = part_section(config, spec)
    with errors_at("model"):
        family_of(config.model.name)  # before the images are looked for
    with errors_at(spec.section):
        check_section(section)
        group = _group(section, mesh)
    with errors_at(f"{spec.section}.data"):
        loaded = load(**data_lib.dataset_arguments(section.data))
        # The images that this part could not decode, not those of other parts.
        dataset = dataclasses.replace(loaded, bad_images=set())
    with errors_at(spec.section):
        steps_per_epoch = data_lib.steps_per_epoch(dataset, section.batch_size)
    with errors_at(f"{spec.section}.schedule"):
        lengths = {"steps_per_epoch": steps_per_epoch, "epochs": section.epochs}
        schedule = make_schedule(section.schedule, batch_size=section.batch_size, **lengths)
    draw = functools.partial(draw_network, num_classes=dataset.num_classes, bn_group=group)
    model = nnx.eval_shape(lambda: draw(config, spec, scales))
    with errors_at(f"{spec.section}.data"):
        on_device = belongs_on_device(section.data, dataset, mesh)
    part = Part(
        name=name,
        spec=spec,
        config=config,
        dataset=dataset,
        mesh=mesh,
        model=model,
        graphdef=nnx.graphdef(model),
        schedule=schedule,
        options=_step_options(config, section, group, mesh, getattr(model, "dropout", 0)),
        steps_per_epoch=steps_per_epoch,
        on_device=on_device,
        scales=scales if spec.needs_scales else None,
    )
    # What the optimizer and the data cannot do is refused now, not after a search.
    unknown = spec.multiplied and scales is None
    _ = (part.with_scales(initial_scales(config)) if unknown else part).tx
    with errors_at(f"{spec.section}.data"):
        part.train_batches(images=not on_device)
        _ = part.eval_batches
    return part


def _step_options(
    config: ConfigDict, section: ConfigDict, group: int, mesh: Mesh, dropout: float
) -> StepOptions:
    draws = section.mix.mixup or section.mix.cutmix or section.random_erasing or dropout
    names = ("label_smoothing", "accumulation", "ema_decay", "random_erasing")
    return StepOptions(
        mean=tuple(section.data.mean),
        std=tuple(section.data.std),
        dtype=DTYPES[config.dtype],
        group=group,
        mesh=mesh,
        seed=config.seed if draws else 0,  # so that seeds share a program where nothing is drawn
        remat=config.remat,
        **section.mix,
        **{name: section[name] for name in names},
    )


def _group(section: ConfigDict, mesh: Mesh) -> int:
    """Images per BatchNorm group."""
    group = samples_per_group(section.batch_size, section.accumulation, section.bn_group, mesh)
    if group < 2 and (section.mix.mixup or section.mix.cutmix):
        raise ValueError(
            "mix.mixup and mix.cutmix need BatchNorm groups of at least 2 images, within which "
            f"they mix, got groups of {group}"
        )
    return group
