"""RepGhostNet's search network, branch by branch, in float64 and without code of `repopt_jax`.

It is run by the names in an official state dict, which say what the network has: a depthwise
convolution between the ghost modules means a stride of 2. `test_ghost_by_branch.py` compares it
with the official PyTorch results, and trains the package's networks beside it.
"""

import jax
import jax.numpy as jnp
import numpy as np


def convolve(x, kernel, stride=1):
    """NCHW images, OIHW kernel padded by half of its side; depthwise where it has one input."""
    groups = x.shape[1] // kernel.shape[1]
    margin = kernel.shape[-1] // 2
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), ((margin, margin),) * 2, feature_group_count=groups
    )


def along_channels(vector):
    return vector[None, :, None, None]


class Pass:
    """One pass through the network; collects the running statistics that training leaves behind."""

    def __init__(self, weights, training):
        self.weights, self.training, self.running = weights, training, {}

    def normalize(self, x, name):
        w = {key: self.weights[f"{name}.{key}"] for key in ("weight", "bias")}
        mean, var = (self.weights[f"{name}.running_{key}"] for key in ("mean", "var"))
        if self.training:
            count = x[:, 0].size
            old = mean, var
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3))
            self.running[f"{name}.running_mean"] = 0.9 * old[0] + 0.1 * mean
            self.running[f"{name}.running_var"] = 0.9 * old[1] + 0.1 * var * count / (count - 1)
        y = (x - along_channels(mean)) / along_channels(jnp.sqrt(var + 1e-5))
        return y * along_channels(w["weight"]) + along_channels(w["bias"])

    def convolve(self, x, name, stride=1):
        y = convolve(x, self.weights[f"{name}.weight"], stride)
        bias = self.weights.get(f"{name}.bias")
        return y if bias is None else y + along_channels(bias)

    def ghost(self, x, name, activate):
        """A pointwise convolution, then the sum of a scaled depthwise one and the identity."""
        x = self.convolve(x, f"{name}.primary_conv.0")
        x = activate(self.normalize(x, f"{name}.primary_conv.1"))
        scale, identity = f"{name}.cheap_operation.1.weight", f"{name}.fusion_scale.weight"
        y = self.convolve(x, f"{name}.cheap_operation.0") * along_channels(self.weights[scale])
        y = y + x * along_channels(self.weights[identity])
        return activate(self.normalize(y, f"{name}.final_bn"))

    def bottleneck(self, x, name):
        stride = 2 if f"{name}.conv_dw.weight" in self.weights else 1
        y = self.ghost(x, f"{name}.ghost1", jax.nn.relu)
        if stride == 2:
            y = self.normalize(self.convolve(y, f"{name}.conv_dw", 2), f"{name}.bn_dw")
        if f"{name}.se.conv_reduce.weight" in self.weights:
            gate = self.convolve(y.mean((2, 3), keepdims=True), f"{name}.se.conv_reduce")
            gate = self.convolve(jax.nn.relu(gate), f"{name}.se.conv_expand")
            y = y * jnp.clip(gate / 6 + 0.5, 0, 1)
        y = self.ghost(y, f"{name}.ghost2", lambda x: x)
        if f"{name}.shortcut.0.weight" in self.weights:
            x = self.normalize(self.convolve(x, f"{name}.shortcut.0", stride), f"{name}.shortcut.1")
            x = self.normalize(self.convolve(x, f"{name}.shortcut.2"), f"{name}.shortcut.3")
        return x + y

    def logits(self, images):
        x = jax.nn.relu(self.normalize(self.convolve(images, "conv_stem", 2), "bn1"))
        names = {n.split(".ghost1")[0]: None for n in self.weights if ".ghost1." in n}
        for name in names:
            x = self.bottleneck(x, name)
        (last,) = (
            n.removesuffix(".conv.weight") for n in self.weights if n.endswith(".conv.weight")
        )
        x = jax.nn.relu(self.normalize(self.convolve(x, f"{last}.conv"), f"{last}.bn1"))
        x = jax.nn.relu(self.convolve(x.mean((2, 3), keepdims=True), "conv_head"))[:, :, 0, 0]
        return x @ self.weights["classifier.weight"].T + self.weights["classifier.bias"][None]


def logits(weights, images):
    """Of a network in evaluation mode; NHWC images."""
    return Pass(weights, training=False).logits(images.transpose(0, 3, 1, 2))


def is_trained(name, kind):
    """Whether a tensor is a parameter; the scales are where "hs" trains them."""
    if name.endswith(("running_mean", "running_var")):
        return False
    return kind == "hs" or not name.endswith("cheap_operation.1.weight")


def is_decayed(name, value):
    """The official rule: matrices and kernels, and vectors by the name `identity.weight`."""
    return value.ndim > 1 or name.endswith("identity.weight")


def train(weights, kind, batches, *, lr, momentum, weight_decay, smoothing):
    """The weights and the losses after all batches in order, by SGD with Nesterov momentum."""

    def loss(trained, others, images, labels):
        run = Pass(trained | others, training=True)
        found = run.logits(images.transpose(0, 3, 1, 2))
        wanted = jax.nn.one_hot(labels, found.shape[-1], dtype=found.dtype) * (1 - smoothing)
        wanted = wanted + smoothing / found.shape[-1]
        return -(wanted * jax.nn.log_softmax(found)).sum(-1).mean(), run.running

    @jax.jit
    def step(trained, others, moments, images, labels):
        (value, running), grads = jax.value_and_grad(loss, has_aux=True)(
            trained, others, images, labels
        )
        new = {}
        for name, w in trained.items():
            g = grads[name] + weight_decay * w * is_decayed(name, w)
            moments[name] = momentum * moments[name] + g
            new[name] = w - lr * (g + momentum * moments[name])
        return new, others | running, moments, value

    weights = {name: jnp.asarray(w, w.dtype) for name, w in weights.items()}
    trained = {name: w for name, w in weights.items() if is_trained(name, kind)}
    others = {name: w for name, w in weights.items() if name not in trained}
    moments, losses = jax.tree.map(np.zeros_like, trained), []
    for images, labels in batches:
        trained, others, moments, value = step(trained, others, moments, images, labels)
        losses.append(float(value))
    return trained | others, losses
