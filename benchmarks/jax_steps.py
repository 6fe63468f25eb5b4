"""Training steps and optimizer updates of the project, compiled and ready to be timed."""

import time

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import repopt_jax
from repopt_jax.training.devices import forward_flops, peak_memory
from repopt_jax.training.step import StepOptions, init_state, train_step

# Kind of network, and whether its optimizer multiplies gradients.
VARIANTS = {
    "target": ("target", True),
    "target, plain SGD": ("target", False),
    "hs": ("hs", False),
    "csla": ("csla", False),
    "repvgg": ("repvgg", False),
}


def optimizer(params, blocks=None, scales=None):
    """SGD as in the official recipe. Without blocks and scales: no multipliers."""
    if blocks is None:
        mults = jax.tree.map(lambda _: None, params)
    else:
        mults = repopt_jax.grad_mults(params, blocks, scales)
    return repopt_jax.repopt_sgd(
        0.1,
        mults,
        momentum=0.9,
        nesterov=True,
        weight_decay=4e-5,
        mask=repopt_jax.weight_decay_mask,
    )


def build(name, kind, multiplied, dtype):
    """A network of its kind and the optimizer."""
    model = repopt_jax.create_model(name, kind, dtype=dtype, rngs=nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)
    if not multiplied:
        return model, optimizer(params)
    scales = repopt_jax.Scales.initial(model)
    return model, optimizer(params, model.blocks(), scales)


def multiply_adds(name, size):
    """Multiply-adds of the plain network's forward pass for one image."""
    model = nnx.eval_shape(lambda: repopt_jax.create_model(name, rngs=nnx.Rngs(0)))
    graphdef, params, stats = nnx.split(model, nnx.Param, ...)
    return forward_flops(graphdef, params, stats, (size, size, 3)) // 2


def bytes_of(tree):
    """Bytes of all arrays of a tree."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def compile_timed(lower):
    """Lower and compile; the program, and the seconds and CPU seconds that it took."""
    wall, cpu = time.perf_counter(), time.process_time()
    compiled = lower().compile()
    return compiled, time.perf_counter() - wall, time.process_time() - cpu


def program_bytes(compiled):
    """The memory that a program needs: arguments, temporary arrays, results with own memory."""
    m = compiled.memory_analysis()
    if m is None:
        return None
    results = m.output_size_in_bytes - m.alias_size_in_bytes
    return m.argument_size_in_bytes + m.temp_size_in_bytes + results


class JaxStep:
    """The training step of a variant with its state.

    Args:
      name: of the model.
      variant: a key of `VARIANTS`.
      images: uint8, (batch, height, width, 3).
      labels: int32, (batch,).
      dtype: of the computation; parameters are float32.
    """

    def __init__(self, name, variant, images, labels, dtype):
        model, self.tx = build(name, *VARIANTS[variant], dtype)
        self.graphdef, self.state = init_state(model, self.tx, ema=False)
        self.options = StepOptions(
            mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), dtype=dtype, label_smoothing=0.1
        )
        self.batch = {"image": jnp.asarray(images), "label": jnp.asarray(labels)}
        self.compiled, self.compile_seconds, self.compile_cpu_seconds = compile_timed(self.lower)
        self.program_bytes = program_bytes(self.compiled)
        self.parameter_bytes = bytes_of(self.state.params)
        self.optimizer_bytes = bytes_of(self.state.opt_state)

    def lower(self):
        """Trace and lower the step anew, so that no earlier compilation is reused."""
        step = jax.jit(
            lambda *a: train_step(self.graphdef, self.tx, self.options, *a), donate_argnums=0
        )
        return step.lower(self.state, self.batch)

    def run(self, count):
        """Run `count` steps and wait for them; the last loss."""
        for _ in range(count):
            self.state, metrics = self.compiled(self.state, self.batch)
        return float(metrics["loss"])

    def peak_bytes(self):
        """The device's peak memory since this process began. None: unknown."""
        return peak_memory()


class UpdateStep:
    """The optimizer's update without the rest of the step.

    Args:
      name: of the model.
      multiplied: whether gradients are multiplied.
    """

    def __init__(self, name, multiplied):
        model, tx = build(name, "target", multiplied, jnp.float32)
        self.params = nnx.state(model, nnx.Param)
        self.gradients = jax.tree.map(lambda x: jnp.full_like(x, 1e-6), self.params)
        self.state = tx.init(self.params)

        def update(params, state, gradients):
            updates, state = tx.update(gradients, state, params)
            return optax.apply_updates(params, updates), state

        # In the order of the results: JAX gives each of those the first donated array of its shape,
        # and momentum written over the parameters would first need a copy of them.
        step = jax.jit(update, donate_argnums=(0, 1))
        lowered = step.lower(self.params, self.state, self.gradients)
        self.compiled = lowered.compile()
        self.program_bytes = program_bytes(self.compiled)

    def run(self, count):
        """Run `count` updates and wait for them."""
        for _ in range(count):
            self.params, self.state = self.compiled(self.params, self.state, self.gradients)
        jax.block_until_ready(self.params)
