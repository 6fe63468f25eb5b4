"""Strictness for every test: eight CPU devices, no silent rank promotion."""

import gc
import importlib.metadata
import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Nearly all of the time goes to compiling programs that run once. With "0" the claims hold as well.
hurried = os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1") == "1"
flags = [os.environ.get("XLA_FLAGS", ""), "--xla_force_host_platform_device_count=8"]
# XLA ends a process that has a flag which it does not know, such as these in jaxlib 0.12.
if hurried and importlib.metadata.version("jaxlib").startswith("0.10."):
    flags.append("--xla_cpu_use_fusion_emitters=false")
    flags.append("--xla_cpu_parallel_codegen_split_count=1")
# Has to be in place before jax is imported; tests hand it on to the processes that they start.
os.environ["XLA_FLAGS"] = " ".join(flags)

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")

SHARED = pathlib.Path(__file__).parents[2] / "shared"


def pytest_configure(config):
    if hasattr(config.option, "loadscopereorder"):  # xdist would begin with the most numerous tests
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    """Files with slow tests come first, so that no worker begins a long one last."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish(session):
    """What is imported lives to the end: the collector need not look at it again and again."""
    gc.freeze()


@pytest.fixture
def x64():
    """Run the test in float64."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def room_for_programs():
    """JAX forgets some of many thousand programs, and with them how many a function has."""
    jax.clear_caches()


@pytest.fixture(scope="module")
def optimized():
    """Compile as users do; for claims about what XLA makes of a program."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def quick_draws():
    """Draw by XLA's generator; programs with JAX's take ten times as long to compile."""
    with jax.default_prng_impl("rbg"):
        yield


@pytest.fixture
def strict():
    """Refuse implicit dtype promotion; for code of ours alone, Optax relies on promotion."""
    with jax.numpy_dtype_promotion("strict"):
        yield


def shared(name, what):
    """A folder beside the project, which users may not have: without it the test is skipped."""
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"{what} (../shared/{name}) are not on this machine")
    return folder


@pytest.fixture
def golden():
    """Folder of float64 results of the official PyTorch code."""
    return shared("golden", "the official code's results")


@pytest.fixture(scope="session")
def tfds_dir():
    """Folder of the real TFDS sets, images of ImageNet and CIFAR-10."""
    return str(shared("tfds", "the real TFDS sets"))


@pytest.fixture
def official_scales():
    """Folder of the scale files that the authors released."""
    return shared("official_scales", "the released scale files")


@pytest.fixture
def golden_family():
    """Folder of float64 results of the sibling papers' PyTorch code."""
    return shared("golden_family", "the siblings' results")
