"""Published sizes of the siblings' networks: their parameter counts, and files of them by name."""

import functools

import jax
import numpy as np
import pytest
from family_networks import RBR, plus_stages, renamed
from flax import nnx

from repopt_jax.models.conv_blocks import PlainBlock
from repopt_jax.models.create import FAMILIES
from repopt_jax.torch_files import recognize
from repopt_jax.torch_files.names import DIALECTS, to_torch, torch_name
from repopt_jax.torch_files.weights import unfilled_model, variables

pytestmark = pytest.mark.slow

# Millions of parameters in training form (as timm counts them) and in deploy form, as published;
# None: not published. YOLOv6's are with its head.
MILLIONS = {
    "RepVGG-A0": (9.11, 8.30),
    "RepVGG-A1": (14.09, 12.78),
    "RepVGG-A2": (28.21, 25.49),
    "RepVGG-B0": (15.82, 14.33),
    "RepVGG-B1": (57.42, 51.82),
    "RepVGG-B1g2": (None, 41.36),
    "RepVGG-B1g4": (39.97, 36.12),
    "RepVGG-B2": (89.02, 80.31),
    "RepVGG-B2g2": (None, None),
    "RepVGG-B2g4": (61.76, 55.77),
    "RepVGG-B3": (123.09, 110.96),
    "RepVGG-B3g2": (None, None),
    "RepVGG-B3g4": (83.83, 75.62),
    "RepVGG-D2se": (133.33, 120.39),
    "RepVGGplus-L2pse": (None, None),
    "MobileOne-S0": (5.29, 2.08),
    "MobileOne-S1": (4.83, 4.76),
    "MobileOne-S2": (7.88, 7.81),
    "MobileOne-S3": (10.17, 10.08),
    "MobileOne-S4": (14.95, 14.84),
    "RepLKNet-31B": (None, 79),
    "RepLKNet-31L": (None, 172),
    "RepLKNet-XL": (None, 335),
    "RepMLPNet-T224": (38.3, None),
    "RepMLPNet-T256": (58.7, None),
    "RepMLPNet-B224": (68.2, None),
    "RepMLPNet-B256": (96.5, None),
    "RepMLPNet-D256": (86.9, None),
    "RepMLPNet-L256": (117.7, None),
    "YOLOv6-N": (None, 4.3),
    "YOLOv6-S": (None, 17.2),
    "YOLOv6-v3-N": (None, 4.7),
    "YOLOv6-v3-S": (None, 18.5),
}
# How far a count may be from the published one, as many digits as that has.
BOUNDS = {"RepVGG": 0.01, "MobileOne": 0.01, "RepLKNet": 0.5, "RepMLPNet": 0.06, "YOLOv6": 0.06}


def family_of(name):
    return next(family for family in BOUNDS if name.startswith(family))


@functools.cache
def published(name, kind=None):
    """A network without numbers; by default in training form."""
    return unfilled_model(name=name, kind=kind or FAMILIES[family_of(name)].baseline)


def count(model):
    return sum(x.size for x in jax.tree.leaves(nnx.state(model, nnx.Param)))


def deployed(name):
    """Parameters of the deploy form: a bias in place of the BatchNorm after a convolution.

    YOLOv6's is counted with a head for 80 classes, its BatchNorms folded: per map a 1x1 and two
    3x3 convolutions, then 1x1 ones to classes and boxes.
    """
    plain = published(name, "target")
    blocks = [block for _, block in nnx.iter_modules(plain) if isinstance(block, PlainBlock)]
    found = count(plain) - sum(block.bn.scale.size for block in blocks)
    if family_of(name) == "YOLOv6":
        widths = FAMILIES["YOLOv6"].sizes[name]["widths"]
        found += sum(19 * c * c + 3 * c + 84 * c + 84 for c in (widths[6], widths[8], widths[10]))
    return found


def test_every_published_size_has_a_count():
    assert MILLIONS.keys() == {name for family in BOUNDS for name in FAMILIES[family].sizes}


@pytest.mark.parametrize("name", MILLIONS)
def test_parameter_counts_are_the_published_ones(name):
    training, plain = MILLIONS[name]
    bound = BOUNDS[family_of(name)]
    assert training is None or abs(count(published(name)) / 1e6 - training) <= bound
    assert plain is None or abs(deployed(name) / 1e6 - plain) <= bound


def shapes(model):
    """The state dict of a network without numbers, every one of them 1."""
    return {
        torch_name(path): to_torch(np.broadcast_to(np.float32(1), value.shape))
        for path, value in variables(model).items()
    }


RECOGNIZED = [
    *("RepVGG-A0", "RepVGG-B1g4", "RepVGG-D2se", "RepVGGplus-L2pse"),
    *("MobileOne-S0", "MobileOne-S4", "RepLKNet-31B", "RepMLPNet-L256"),
    *("YOLOv6-N", "YOLOv6-v3-N"),
]


@pytest.mark.parametrize("name", RECOGNIZED)
def test_published_sizes_are_recognized(name):
    """In training form, by the names of their authors."""
    family = family_of(name)
    dialect = next(d for d in DIALECTS if d.family == family)
    weights = {dialect.own(official): value for official, value in shapes(published(name)).items()}
    facts = recognize(weights)
    assert (facts["name"], facts["kind"]) == (name, FAMILIES[family].baseline)


DEPLOYED = {r"conv\.": "rbr_reparam.", r"bn\.bias": "rbr_reparam.bias", r"bn\.\w+": "dropped"}


@pytest.mark.parametrize(("kind", "words"), [("repvgg", RBR), ("target", DEPLOYED)])
def test_repvggplus_is_recognized_by_its_own_names(kind, words):
    """Its 24 blocks of stage 3 lie in two lists of 12."""
    weights = renamed(shapes(published("RepVGGplus-L2pse", kind)), {**words, **plus_stages(24)})
    weights = {name: value for name, value in weights.items() if not name.endswith("dropped")}
    last = "rbr_dense.conv" if kind == "repvgg" else "rbr_reparam"
    assert f"stage3_second.blocks.11.{last}.weight" in weights
    facts = recognize(weights)
    assert (facts["name"], facts["kind"]) == ("RepVGGplus-L2pse", kind)
    assert (facts["num_blocks"], facts["se"]) == ((8, 14, 24, 1), True)
