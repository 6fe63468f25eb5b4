"""Paths of files that earlier versions wrote."""

import jax
import pytest
from flax import nnx

from repopt_jax.torch_files.weights import unfilled_model
from repopt_jax.tree_paths import current_path, path_str


@pytest.mark.parametrize(
    "kind", ["target", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("hs", "rep"))]
)
def test_every_old_path_of_a_ghostnet_becomes_todays(kind):
    model = unfilled_model(name="RepOpt-GhostNet", kind=kind, width=0.1)
    paths = [path_str(p) for p, _ in jax.tree_util.tree_leaves_with_path(nnx.state(model))]
    assert sum(path.startswith("stages/") for path in paths) > 300
    for path in paths:
        old = path.replace("stages/", "blocks/")
        assert current_path(old) == path
        assert current_path(f"params/{old}/value") == f"params/{path}/value"
        assert current_path(path) == path


@pytest.mark.parametrize(
    "path", ["blocks/0/0/conv_dw/full", "blocks/3/conv/kernel", "my_blocks/0/0/ghost1/x"]
)
def test_paths_of_other_networks_stay(path):
    assert current_path(path) == path
