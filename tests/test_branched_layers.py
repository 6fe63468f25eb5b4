"""Which layers of a network get branches, and which are refused."""

import jax.numpy as jnp
import pytest
from flax import nnx
from test_search import FULL, Net, abstract

from repopt_jax import (
    Centre,
    FoldedConv,
    FrozenPointwise,
    Full,
    Identity,
    find_blocks,
    init_target,
    repvgg_branches,
    search_network,
)


def test_rule_finds_every_3x3_convolution():
    blocks = find_blocks(abstract(Net), repvgg_branches)
    identity = {path: block.get("identity") for path, block in blocks.items()}
    assert identity == {
        "body/0": Identity(groups=2),
        "body/1": Identity(groups=4),
        "stem": None,
    }


def test_patterns_name_layers_and_the_first_match_counts():
    model = abstract(Net)
    blocks = find_blocks(model, {"body/1": {"first": Full()}, "body/*": FULL})
    assert blocks == {"body/0": FULL, "body/1": {"first": Full()}}
    with pytest.raises(ValueError, match=r"rule.*\['tail'\]"):
        find_blocks(model, {"tail": FULL, "head": FULL})
    with pytest.raises(ValueError, match=r"rule.*body/0"):
        find_blocks(model, lambda path, layer: None)


@pytest.mark.parametrize(
    ("model", "rule", "message"),
    [
        (abstract(Net), "repvgg", "rule must be .* got 'repvgg'"),
        ({"conv": {"kernel": jnp.ones((3, 3, 2, 2))}}, repvgg_branches, "model must .* got a dict"),
        (nnx.Conv(2, 2, (3, 3), rngs=nnx.Rngs(0)), repvgg_branches, "model must .* got a Conv"),
    ],
    ids=["a name", "a dict of parameters", "a layer alone"],
)
def test_what_is_no_rule_or_no_network_is_refused(model, rule, message):
    with pytest.raises(ValueError, match=message):
        find_blocks(model, rule)


def stacked(rngs):
    layer = nnx.Linear(2, 2, rngs=rngs)
    layer.kernel = nnx.Param(jnp.ones((3, 2, 2)))
    return layer


@pytest.mark.parametrize(
    ("make", "block", "message"),
    [
        (lambda r: nnx.LayerNorm(2, rngs=r), FULL, "kernel.*LayerNorm"),
        (
            lambda r: nnx.ConvTranspose(2, 2, (3, 3), transpose_kernel=True, rngs=r),
            FULL,
            "ConvTranspose.*transpose_kernel",
        ),
        (stacked, FULL, r"rank 2.*\(3, 2, 2\)"),
        (
            lambda r: nnx.Conv(4, 8, (3, 3), feature_group_count=2, rngs=r),
            {"identity": Identity(groups=4)},
            "'identity'.*groups=2.*4",
        ),
        (
            lambda r: nnx.Conv(4, 8, (3, 3), rngs=r),
            {"frozen": FrozenPointwise(4, groups=2)},
            "'frozen'.*groups=1.*2",
        ),
        (lambda r: nnx.Linear(2, 3, rngs=r), {"centre": Centre(1)}, "'centre'"),
        (lambda r: nnx.Linear(2, 3, rngs=r), {"two": [Full(), Full()]}, "'two'.*Branch"),
    ],
)
def test_layers_without_an_equivalence_are_refused_by_path(make, block, message):
    model = nnx.eval_shape(lambda: nnx.Sequential(make(nnx.Rngs(0))))
    with pytest.raises(ValueError, match=f"block 'layers/0': .*{message}"):
        search_network(model, {"layers/0": block}, rngs=nnx.Rngs(0))
    scales = {"layers/0": {name: jnp.ones(2) for name in block}}
    with pytest.raises(ValueError, match=f"block 'layers/0': .*{message}"):
        init_target(model, scales, blocks={"layers/0": block}, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("make", "block"),
    [
        (lambda r: nnx.Conv(2, 2, (3,), rngs=r), {"conv1": Centre(1), "identity": Identity()}),
        (lambda r: nnx.Conv(2, 4, 3, rngs=r), {"conv1": Centre(1)}),
        (lambda r: nnx.ConvTranspose(2, 3, (4, 4), strides=2, rngs=r), {"small": Centre(2)}),
        (lambda r: nnx.Linear(8, 8, rngs=r), {"folded": FoldedConv((2, 2), (3, 3))}),
    ],
)
def test_layers_of_other_kinds_get_branches(make, block):
    blocks = {"layers/0": block}
    search = abstract(lambda r: search_network(nnx.Sequential(make(r)), blocks, rngs=r))
    assert list(search.layers[0].branch_weights) == list(block)
