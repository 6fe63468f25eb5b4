"""RepOptimizers (gradient re-parameterization) for JAX, Flax and Optax.

Public names are loaded when they are first used, so that `repopt_jax.data`, whose worker
processes must start quickly, loads no JAX.
"""

from etils import epy as _epy

__version__ = "0.1.0"

with _epy.lazy_api_imports(globals()):
    from repopt_jax.branches import Block as Block
    from repopt_jax.branches import BlockDiagonal as BlockDiagonal
    from repopt_jax.branches import Branch as Branch
    from repopt_jax.branches import BranchMult as BranchMult
    from repopt_jax.branches import Centre as Centre
    from repopt_jax.branches import Diagonal as Diagonal
    from repopt_jax.branches import Dilated as Dilated
    from repopt_jax.branches import FoldedConv as FoldedConv
    from repopt_jax.branches import FoldedDepthwise as FoldedDepthwise
    from repopt_jax.branches import FrozenPointwise as FrozenPointwise
    from repopt_jax.branches import Full as Full
    from repopt_jax.branches import Identity as Identity
    from repopt_jax.branches import LowRank as LowRank
    from repopt_jax.branches import PooledPointwise as PooledPointwise
    from repopt_jax.branches import Window as Window
    from repopt_jax.branches import branch_mult as branch_mult
    from repopt_jax.branches import check_block as check_block
    from repopt_jax.branches import grad_mults as grad_mults
    from repopt_jax.branches import init_weights as init_weights
    from repopt_jax.branches import initial_scales as initial_scales
    from repopt_jax.branches import merge as merge
    from repopt_jax.branches import pull_back as pull_back
    from repopt_jax.branches import split_kernel as split_kernel
    from repopt_jax.branches.presets import acnet_branches as acnet_branches
    from repopt_jax.branches.presets import dbb_branches as dbb_branches
    from repopt_jax.branches.presets import mobileone_branches as mobileone_branches
    from repopt_jax.branches.presets import repghost_branches as repghost_branches
    from repopt_jax.branches.presets import replknet_branches as replknet_branches
    from repopt_jax.branches.presets import repmlp_branches as repmlp_branches
    from repopt_jax.branches.presets import repvgg_branches as repvgg_branches
    from repopt_jax.files import load_scales as load_scales
    from repopt_jax.files import load_weights as load_weights
    from repopt_jax.hub import from_pretrained as from_pretrained
    from repopt_jax.hub import save_pretrained as save_pretrained
    from repopt_jax.models import MobileOne as MobileOne
    from repopt_jax.models import RepLKNet as RepLKNet
    from repopt_jax.models import RepMLPNet as RepMLPNet
    from repopt_jax.models import RepOptGhost as RepOptGhost
    from repopt_jax.models import RepOptVGG as RepOptVGG
    from repopt_jax.models import Target as Target
    from repopt_jax.models import YOLOv6 as YOLOv6
    from repopt_jax.models import create_model as create_model
    from repopt_jax.models import find_blocks as find_blocks
    from repopt_jax.models import init_target as init_target
    from repopt_jax.models import search_network as search_network
    from repopt_jax.models import searched_scales as searched_scales
    from repopt_jax.models import target_network as target_network
    from repopt_jax.reparameterization import ReparameterizeState as ReparameterizeState
    from repopt_jax.reparameterization import reparameterize as reparameterize
    from repopt_jax.scales import Scales as Scales
    from repopt_jax.scales import save_scales as save_scales
    from repopt_jax.torch_files.weights import load_torch_weights as load_torch_weights
    from repopt_jax.transforms import ScaleByGradMultState as ScaleByGradMultState
    from repopt_jax.transforms import repopt_adamw as repopt_adamw
    from repopt_jax.transforms import repopt_sgd as repopt_sgd
    from repopt_jax.transforms import scale_by_grad_mult as scale_by_grad_mult
    from repopt_jax.weight_decay import weight_decay_mask as weight_decay_mask

__all__ = [name for name in globals()["__dir__"]() if not name.startswith("_")]
