"""Tiny networks of the family, sized as in `../shared/golden_family`, and their numbers."""

import re

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from pruning_networks import section

from repopt_jax.models.create import FAMILIES
from repopt_jax.torch_files import import_weights, recognize
from repopt_jax.torch_files.weights import fill, unfilled_model, variables

_YOLOV6 = {
    "name": "YOLOv6",
    "num_blocks": (1, 2, 2, 3, 1, 2, 1, 2, 1),
    "widths": (4, 6, 8, 10, 12, 6, 4, 4, 6, 6, 8),
}
TINY = {
    "repvgg_g4_tiny": {
        "name": "RepVGG",
        "num_blocks": (2, 2, 3, 1),
        "widths": (8, 8, 16, 16, 32),
        "groups": 4,
        "num_classes": 5,
    },
    "repvgg_d2se_tiny": {
        "name": "RepVGG",
        "num_blocks": (2, 2, 3, 1),
        "widths": (16, 16, 16, 32, 32),
        "pre_se": True,
        "num_classes": 5,
    },
    "mobileone_tiny": {
        "name": "MobileOne",
        "num_blocks": (1, 2, 2, 1),
        "widths": (8, 8, 16, 32, 64),
        "copies": 3,
        "se_blocks": (0, 0, 0, 0),
        "num_classes": 5,
    },
    "mobileone_se_tiny": {
        "name": "MobileOne",
        "num_blocks": (1, 2, 2, 1),
        "widths": (8, 8, 16, 32, 64),
        "copies": 1,
        "se_blocks": (0, 0, 1, 1),
        "num_classes": 5,
    },
    "replknet_tiny": {
        "name": "RepLKNet",
        "num_blocks": (1, 1, 2, 1),
        "widths": (8, 12, 16, 20),
        "kernel_sizes": (11, 9, 7, 5),
        "ratio": 1.0,
        "num_classes": 5,
    },
    "repmlpnet_tiny": {
        "name": "RepMLPNet",
        "num_blocks": (1, 2),
        "widths": (8, 16),
        "patches": (4, 2),
        "sets": (2, 4),
        "num_classes": 5,
    },
    "efficientrep_reppan_tiny": {**_YOLOV6, "bifpan": False},
    "efficientrep_bifpan_tiny": {**_YOLOV6, "bifpan": True},
}


# Parts of our exported names, as patterns -> what RepVGG's authors call them.
RBR = {
    **{r"conv_3x3\.": "rbr_dense.conv.", r"bn_3x3\.": "rbr_dense.bn."},
    **{r"conv_1x1\.": "rbr_1x1.conv.", r"bn_1x1\.": "rbr_1x1.bn."},
    **{r"bn_identity\.": "rbr_identity."},
}


def plus_stages(blocks):
    """Our stages -> RepVGGplus's, of a network with so many blocks in stage 3."""
    half = blocks // 2
    return {
        **{rf"stage{i}\.": f"stage{i}.blocks." for i in (1, 2, 4)},
        **{rf"stage3\.{i}\.": f"stage3_first.blocks.{i}." for i in range(half)},
        **{rf"stage3\.{i}\.": f"stage3_second.blocks.{i - half}." for i in range(half, blocks)},
    }


def renamed(weights, words):
    """Part by part, left to right, as the other code has them."""
    result = {}
    for name, value in weights.items():
        for ours, theirs in words.items():
            name = re.sub(rf"(^|\.){ours}", rf"\g<1>{theirs}", name, count=1)
        result[name] = value
    return result


def baseline(name):
    """The kind of a tiny network in training form."""
    return FAMILIES[TINY[name]["name"]].baseline


def around_one(rng, shape):
    """Numbers that keep outputs of a sensible size, and no two alike."""
    if len(shape) < 2:
        return rng.uniform(0.5, 1.5, shape)
    return rng.normal(size=shape) * np.prod(shape[:-1]) ** -0.5


def drawn(model, draw=around_one, seed=0):
    """`model` with other numbers for every variable, from numpy: JAX would compile each draw."""
    rng = np.random.default_rng(seed)

    def value(x):
        # Cast by numpy: JAX would compile a program for every shape.
        return jnp.asarray(np.asarray(draw(rng, x.shape)).astype(x.dtype), x.dtype)

    nnx.update(model, jax.tree.map(value, nnx.state(model)))
    return model


def begun(model):
    """`model` as it begins, its kernels within torch's bounds: again without compiling draws."""
    rng = np.random.default_rng(0)

    def value(path, shape):
        if path.endswith(("/scale", "/var")):
            return np.ones(shape)
        if path.endswith("/mean") or re.search("bn.*/bias$", path):
            return np.zeros(shape)
        return rng.uniform(-1, 1, shape) * np.prod(shape[:-1] or shape) ** -0.5

    arrays = {p: value(p, v.shape).astype(v.dtype) for p, v in variables(model).items()}
    return fill(model, arrays)


def deploy_form(arrays):
    """The state dict of the deploy form; RepLKNet's file has its merged kernels alone."""
    if found := section(arrays, "deploy/"):
        return found
    train = section(arrays, "train/")
    rest = {k: v for k, v in train.items() if not re.search(r"lkb_origin|small_conv", k)}
    return rest | section(arrays, "merged/")


def read(weights, dtype=jnp.float64):
    """The network of a state dict, as in inference."""
    model = import_weights(unfilled_model(**recognize(weights), param_dtype=dtype), weights)
    model.eval()
    return model


def outputs(*models):
    """In inference, of all models in one program."""
    images = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    for model in models:
        model.eval()
    return jax.jit(lambda images: [model(images) for model in models])(images)


def assert_same(found, wanted):
    """The same names, and the same bits under each."""
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)
