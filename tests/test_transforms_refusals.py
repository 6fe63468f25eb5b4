"""What no parameter could be multiplied by is refused, with the name of what is wrong."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_transforms import BLOCK, BLOCKS, SCALES, make_params, mults_of

import repopt_jax
from repopt_jax import Centre, Full, grad_mults, repopt_adamw, repopt_sgd
from repopt_jax import scale_by_grad_mult as by_mult


@pytest.mark.parametrize(
    ("mult", "message"),
    [
        (np.array([1.0, np.nan]), r"grad_mults\['bn/scale'\].*nan"),
        (np.array([1.0, -1.0]), r"grad_mults\['bn/scale'\].*-1\.0"),
        ("one", r"grad_mults\['bn/scale'\].*str"),
        (
            repopt_jax.branch_mult({"full": Full()}, {"full": np.ones(2)}, "direction"),
            r"grad_mults\['bn/scale'\].*rule.*direction",
        ),
        (
            repopt_jax.branch_mult({"full": Full()}, {"full": np.array([1.0, np.inf])}),
            r"grad_mults\['bn/scale'\].*full.*inf",
        ),
    ],
)
def test_factory_refuses(mult, message):
    mults = {"conv": {"kernel": None}, "bn": {"scale": mult, "bias": None}}
    with pytest.raises(ValueError, match=message):
        by_mult(mults)


@pytest.mark.parametrize(
    ("mults", "message"),
    [
        ({"conv": {"kernel": None}}, r"missing: \['bn/bias', 'bn/scale'\], surplus: none"),
        (
            {"conv": {"kernel": None, "bias": None}, "bn": {"scale": None, "bias": None}},
            r"missing: none, surplus: \['conv/bias'\]",
        ),
        (
            {"conv": {"kernel": None}, "bn": {"scale": np.ones(3), "bias": None}},
            r"'bn/scale'\].*\(2,\).*\(3,\)",
        ),
        (
            {"conv": {"kernel": np.ones((1, 3, 3, 2, 2))}, "bn": {"scale": None, "bias": None}},
            r"'conv/kernel'\].*\(1, 3, 3, 2, 2\)",
        ),
        (
            {
                "conv": {"kernel": repopt_jax.branch_mult(BLOCK, {**SCALES["conv"],
                                                          "conv1x1": np.ones(3)})},
                "bn": {"scale": None, "bias": None},
            },
            r"'conv/kernel'\].*\(2,\).*'conv1x1': \(3,\)",
        ),
        (
            {
                "conv": {"kernel": repopt_jax.branch_mult({"big": Centre(5)},
                                                          {"big": np.ones(2)})},
                "bn": {"scale": None, "bias": None},
            },
            r"'conv/kernel'\].*'big'.*\(3, 3, 2, 2\)",
        ),
        (None, r"grad_mults must be a tree like the parameters, got None"),
    ],
)  # fmt: skip
def test_init_refuses(mults, message):
    with pytest.raises(ValueError, match=message):
        by_mult(mults).init(make_params())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum": 1.0}, r"momentum.*1\.0"),
        ({"weight_decay": -1.0}, r"weight_decay.*-1\.0"),
    ],
)
def test_sgd_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        repopt_sgd(0.1, {}, **options)


def test_adamw_refuses_multipliers_of_the_linear_rule():
    with pytest.raises(ValueError, match=r"rule.*linear"):
        repopt_adamw(0.1, mults_of(make_params()))


@pytest.mark.parametrize(
    ("blocks", "scales", "message"),
    [
        ({"nope": BLOCK}, {"nope": SCALES["conv"]}, r"kernel.*\['nope'\]"),
        (BLOCKS, {}, r"scales.*\['conv'\]"),
        (BLOCKS, {"conv": {"conv3x3": jnp.ones(3)}}, r"scales.*\['conv/conv1x1'\]"),
    ],
)
def test_grad_mults_refuses(blocks, scales, message):
    with pytest.raises(ValueError, match=message):
        grad_mults(make_params(), blocks, scales)


def test_an_unknown_rule_is_refused_though_no_multiplier_has_one():
    with pytest.raises(ValueError, match=r"rule.*dirction"):
        by_mult({"w": jnp.ones(2)}, rule="dirction")


@pytest.mark.parametrize(
    ("blocks", "scales", "message"),
    [
        ([BLOCKS], SCALES, r"blocks must be .* paths of layers, got a list"),
        (BLOCKS["conv"], SCALES, r"blocks\['conv3x3'\]: block .* got a Full"),
        ({"conv": ["conv3x3"]}, SCALES, r"blocks\['conv'\]: block .* got a list"),
        (
            {"conv": {"conv3x3": "Full"}},
            SCALES,
            r"blocks\['conv'\]: branch 'conv3x3' .* got 'Full'",
        ),
        (BLOCKS, "b1.safetensors", r"scales must be .* got 'b1.safetensors'"),
        (BLOCKS, None, r"scales must be .* got None"),
        (BLOCKS, {"conv": np.ones(2)}, r"scales\['conv'\] must be .* got a ndarray"),
        (BLOCKS, {"conv": {"conv3x3": np.ones(2)}}, r"missing: \['conv/conv1x1'"),
    ],
)
def test_blocks_and_scales_of_other_forms_are_refused(blocks, scales, message):
    with pytest.raises(ValueError, match=message):
        grad_mults(make_params(), blocks, scales)
    with pytest.raises(ValueError, match=message):
        repopt_jax.reparameterize(optax.sgd(0.1), blocks, scales)


@pytest.mark.parametrize(
    ("vector", "message"),
    [(np.ones(3), r"scales .* \(2,\) .*\(3,\)"), (np.array([1.0, np.nan]), "finite.*nan")],
)
def test_reparameterize_refuses_scales_that_no_kernel_has(vector, message):
    scales = {"conv": {name: vector for name in BLOCK}}
    with pytest.raises(ValueError, match=f"block 'conv': .*{message}"):
        repopt_jax.reparameterize(optax.sgd(0.1), BLOCKS, scales).init(make_params())


@pytest.mark.parametrize("optimizer", ["sgd", optax.sgd], ids=["a name", "a factory"])
def test_reparameterize_refuses_what_is_no_optimizer(optimizer):
    with pytest.raises(ValueError, match=r"optimizer must .* got .*sgd"):
        repopt_jax.reparameterize(optimizer, BLOCKS, SCALES)
