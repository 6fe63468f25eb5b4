"""RepOpt-VGG trained branch by branch, in float64 and without any code of `repopt_jax`.

What the package claims is that a plain network under a RepOptimizer trains as this does: a block
runs a 3x3 and a 1x1 convolution and an identity, multiplies each by its constant, adds them, and
normalizes. `test_branch_by_branch.py` compares this file with the official PyTorch results, and
the package with `branch_by_branch.npz`, which this file writes:

    python tests/branch_by_branch.py
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np

FILE = pathlib.Path(__file__).with_suffix(".npz")
NUM_BLOCKS, WIDTHS, STRIDES, CLASSES = (1, 3, 1, 1), (2, 2, 3, 4, 4), (1, 2, 2, 2, 1), 3
SETUP = {"smoothing": 0.1, "weight_decay": 1e-2}
SGD = {"lr": 0.02, "momentum": 0.9, **SETUP}
ADAMW = {"lr": 1e-3, "b1": 0.9, "b2": 0.999, "eps": 1e-8, **SETUP}


def convolve(x, kernel, stride, margin):
    """NHWC images, HWIO kernel, `margin` zeros on every side."""
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), ((margin, margin),) * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip


def forward(trained, scales, strides, images):
    """Logits, and the batch's mean and unbiased variance in every block."""
    x, statistics = images, {}
    for name, stride in strides.items():
        block, scale = trained[name], scales[name]
        y = convolve(x, block["conv3x3"], stride, 1) * scale["conv3x3"][None, None, None]
        y = y + convolve(x, block["conv1x1"], stride, 0) * scale["conv1x1"][None, None, None]
        if "identity" in block:
            y = y + x * block["identity"][None, None, None]
        mean, var = y.mean((0, 1, 2)), y.var((0, 1, 2))
        count = y[..., 0].size
        statistics[name] = {"mean": mean, "var": var * count / (count - 1)}
        y = (y - mean[None, None, None]) / jnp.sqrt(var + 1e-5)[None, None, None]
        x = jnp.maximum(y * block["gamma"][None, None, None] + block["beta"][None, None, None], 0)
    head = trained["linear"]
    return x.mean((1, 2)) @ head["kernel"] + head["bias"][None], statistics


def loss(trained, scales, strides, images, labels, smoothing):
    """Mean cross entropy against smoothed labels."""
    logits, statistics = forward(trained, scales, strides, images)
    wanted = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype) * (1 - smoothing)
    wanted = wanted + smoothing / logits.shape[-1]
    return -(wanted * jax.nn.log_softmax(logits)).sum(-1).mean(), statistics


def decay(trained, weight_decay):
    """`weight_decay` for kernels and identities, 0 for biases and BatchNorm."""
    return {
        place: {n: weight_decay * (w.ndim > 1 or n == "identity") for n, w in part.items()}
        for place, part in trained.items()
    }


def sgd(lr, momentum, weight_decay, **_):
    """Nesterov momentum with coupled decay, as torch.optim.SGD."""

    def update(w, g, state, coefficient, _):
        (m,) = state
        g = g + coefficient * w
        m = momentum * m + g
        return w - lr * (g + momentum * m), (m,)

    return update, 1


def adamw(lr, b1, b2, eps, weight_decay, **_):
    """Adam with decoupled decay, as torch.optim.AdamW."""

    def update(w, g, state, coefficient, step):
        m, v = state
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        w = w - lr * coefficient * w
        root = jnp.sqrt(v / (1 - b2 ** (step + 1))) + eps
        return w - lr * m / (1 - b1 ** (step + 1)) / root, (m, v)

    return update, 2


def train(trained, scales, strides, batches, optimizer, setup):
    """The trained parts, the running statistics and the losses after all batches in order."""
    update, moments = optimizer(**setup)
    coefficients = decay(trained, setup["weight_decay"])
    state = jax.tree.map(lambda w: (np.zeros_like(w),) * moments, trained)
    # Arrays from the first step on, so that all steps are one program.
    gammas = {name: trained[name]["gamma"] for name in strides}
    running = {n: {"mean": np.zeros_like(w), "var": np.ones_like(w)} for n, w in gammas.items()}

    @jax.jit
    def advance(trained, running, state, step, images, labels):
        (value, found), grads = jax.value_and_grad(loss, has_aux=True)(
            trained, scales, strides, images, labels, setup["smoothing"]
        )
        running = jax.tree.map(lambda old, new: 0.9 * old + 0.1 * new, running, found)
        new = {
            place: {
                name: update(
                    w, grads[place][name], state[place][name], coefficients[place][name], step
                )
                for name, w in part.items()
            }
            for place, part in trained.items()
        }
        trained, state = (
            {place: {n: both[i] for n, both in part.items()} for place, part in new.items()}
            for i in (0, 1)
        )
        return trained, running, state, value

    losses = []
    for step, batch in enumerate(batches):
        trained, running, state, value = advance(trained, running, state, step, *batch)
        losses.append(float(value))
    return trained, running, losses


def merged(block, scale):
    """The one kernel that a block's branches stand for."""
    block, scale = jax.tree.map(np.asarray, (block, scale))
    kernel = block["conv3x3"] * scale["conv3x3"]
    kernel[1, 1] += block["conv1x1"][0, 0] * scale["conv1x1"]
    if "identity" in block:
        kernel[1, 1] += np.diag(block["identity"])
    return kernel


def draw():
    """A small network with scales of both signs, and three batches of four images of 8 px."""
    rng = np.random.RandomState(0)  # whose numbers are the same in every version of NumPy

    def values(*shape, size=1.0):
        return jnp.asarray(rng.normal(0, size, shape), jnp.float64)

    trained, scales, strides, width = {}, {}, {}, 3
    for stage, count in enumerate((1, *NUM_BLOCKS)):
        for i in range(count):
            name = f"stage{stage}/{i}" if stage else "stage0"
            inputs, width = width, WIDTHS[stage]
            strides[name] = STRIDES[stage] if i == 0 else 1
            scales[name] = {n: values(width) for n in ("conv3x3", "conv1x1")}
            trained[name] = {
                "conv3x3": values(3, 3, inputs, width, size=0.3),
                "conv1x1": values(1, 1, inputs, width, size=0.5),
                "gamma": 1 + values(width, size=0.3),
                "beta": values(width, size=0.3),
            }
            if inputs == width and strides[name] == 1:
                trained[name]["identity"] = 1 + values(width, size=0.3)
    trained["linear"] = {"kernel": values(width, CLASSES), "bias": values(CLASSES)}
    images, labels = values(3, 4, 8, 8, 3), jnp.asarray(rng.randint(0, CLASSES, (3, 4)))
    return trained, scales, strides, list(zip(images, labels, strict=True))


def results():
    """The merged kernels, running statistics and losses after SGD and AdamW, as the file has them.

    Those of all blocks follow one another in network order, flat.
    """
    found = {}
    for name, optimizer, setup in (("sgd", sgd, SGD), ("adamw", adamw, ADAMW)):
        trained, scales, strides, batches = draw()
        after, running, losses = train(trained, scales, strides, batches, optimizer, setup)
        kernels = [merged(after[place], scales[place]) for place in strides]
        found[f"{name}/kernels"] = np.concatenate([k.ravel() for k in kernels])
        for key in ("mean", "var"):
            found[f"{name}/{key}"] = np.concatenate([running[place][key] for place in strides])
        found[f"{name}/linear"] = np.asarray(after["linear"]["kernel"])
        found[f"{name}/losses"] = np.asarray(losses)
    return found


if __name__ == "__main__":
    with jax.enable_x64(True):
        np.savez_compressed(FILE, **results())
    print(FILE, FILE.stat().st_size, "bytes")
