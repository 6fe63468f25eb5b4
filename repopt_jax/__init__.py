"""RepOptimizers (gradient re-parameterization) for JAX, Flax and Optax.

Public names are loaded when they are first used: reading a scales file needs no JAX, and starts
in a fraction of a second.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from repopt_jax.branches import Block as Block
    from repopt_jax.branches import BlockDiagonal as BlockDiagonal
    from repopt_jax.branches import Branch as Branch
    from repopt_jax.branches import BranchMult as BranchMult
    from repopt_jax.branches import Centre as Centre
    from repopt_jax.branches import Diagonal as Diagonal
    from repopt_jax.branches import Dilated as Dilated
    from repopt_jax.branches import FoldedConv as FoldedConv
    from repopt_jax.branches import FrozenPointwise as FrozenPointwise
    from repopt_jax.branches import Full as Full
    from repopt_jax.branches import Identity as Identity
    from repopt_jax.branches import LowRank as LowRank
    from repopt_jax.branches import PooledPointwise as PooledPointwise
    from repopt_jax.branches import Window as Window
    from repopt_jax.branches import branch_mult as branch_mult
    from repopt_jax.branches import check_block as check_block
    from repopt_jax.branches import init_weights as init_weights
    from repopt_jax.branches import initial_scales as initial_scales
    from repopt_jax.branches import merge as merge
    from repopt_jax.branches import pull_back as pull_back
    from repopt_jax.models import RepOptGhost as RepOptGhost
    from repopt_jax.models import RepOptVGG as RepOptVGG
    from repopt_jax.models import Target as Target
    from repopt_jax.models import create_model as create_model
    from repopt_jax.models import find_blocks as find_blocks
    from repopt_jax.models import init_target as init_target
    from repopt_jax.models import repvgg_branches as repvgg_branches
    from repopt_jax.models import search_network as search_network
    from repopt_jax.models import searched_scales as searched_scales
    from repopt_jax.models import target_network as target_network
    from repopt_jax.reparameterization import ReparameterizeState as ReparameterizeState
    from repopt_jax.reparameterization import reparameterize as reparameterize
    from repopt_jax.scales import Scales as Scales
    from repopt_jax.scales import load_scales as load_scales
    from repopt_jax.scales import save_scales as save_scales
    from repopt_jax.torch_files.weights import load_torch_weights as load_torch_weights
    from repopt_jax.torch_files.weights import load_weights as load_weights
    from repopt_jax.transforms import ScaleByGradMultState as ScaleByGradMultState
    from repopt_jax.transforms import grad_mults as grad_mults
    from repopt_jax.transforms import repopt_adamw as repopt_adamw
    from repopt_jax.transforms import repopt_sgd as repopt_sgd
    from repopt_jax.transforms import scale_by_grad_mult as scale_by_grad_mult
    from repopt_jax.transforms import weight_decay_mask as weight_decay_mask

__version__ = "0.1.0"

_MODULE_OF = {
    "Block": "branches",
    "BlockDiagonal": "branches",
    "Branch": "branches",
    "BranchMult": "branches",
    "Centre": "branches",
    "Diagonal": "branches",
    "Dilated": "branches",
    "FoldedConv": "branches",
    "FrozenPointwise": "branches",
    "Full": "branches",
    "Identity": "branches",
    "LowRank": "branches",
    "PooledPointwise": "branches",
    "Window": "branches",
    "branch_mult": "branches",
    "check_block": "branches",
    "init_weights": "branches",
    "initial_scales": "branches",
    "merge": "branches",
    "pull_back": "branches",
    "RepOptGhost": "models",
    "RepOptVGG": "models",
    "Target": "models",
    "create_model": "models",
    "find_blocks": "models",
    "init_target": "models",
    "repvgg_branches": "models",
    "search_network": "models",
    "searched_scales": "models",
    "target_network": "models",
    "ReparameterizeState": "reparameterization",
    "reparameterize": "reparameterization",
    "Scales": "scales",
    "load_scales": "scales",
    "load_torch_weights": "torch_files.weights",
    "load_weights": "torch_files.weights",
    "save_scales": "scales",
    "ScaleByGradMultState": "transforms",
    "grad_mults": "transforms",
    "repopt_adamw": "transforms",
    "repopt_sgd": "transforms",
    "scale_by_grad_mult": "transforms",
    "weight_decay_mask": "transforms",
}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str):
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
