"""Strictness for every test: eight CPU devices, no silent rank promotion."""

import os

# Has to be in place before jax starts its CPU backend.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Nearly all of the time goes to compiling programs that run once. With "0" the claims hold as well.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import pathlib

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

SHARED = pathlib.Path(__file__).parents[2] / "shared"


@pytest.fixture
def x64():
    """Run the test in float64."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def optimized():
    """Compile as users do; for claims about what XLA makes of a program."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def strict():
    """Refuse implicit dtype promotion; for code of ours alone, Optax relies on promotion."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def golden():
    """Folder of float64 results of the official PyTorch code, which users do not have."""
    folder = SHARED / "golden"
    if not folder.is_dir():
        pytest.skip("the official code's results (../shared/golden) are not on this machine")
    return folder


@pytest.fixture
def official_scales():
    """Folder of the scale files that the authors released, which users may not have."""
    folder = SHARED / "official_scales"
    if not folder.is_dir():
        pytest.skip("the released scale files (../shared/official_scales) are not on this machine")
    return folder
