"""Linear branches: a re-parameterized kernel stated once, everything else derived.

A re-parameterized kernel is a sum of linear branches (RepOptimizers, arXiv 2205.15242,
section 3)::

    W = sum_b s_b * E_b(w_b)

``w_b`` is the weight of branch ``b``, ``E_b`` the linear map that places it inside the big
kernel and ``s_b`` a constant per output channel. A *block* states its branches as data, for
RepOpt-VGG ``{"conv3x3": Full(), "conv1x1": Centre(1), "identity": Identity()}``. From this
statement alone follow the merged kernel, the Rule of Initialization, the multipliers of the
Rule of Iteration and, through ``jax.linear_transpose``, the exact operator for any branch.

The blocks of sibling papers are in `repopt_jax.branches.presets`, which alone loads Flax.

Layout: kernels are ``(*window, in / groups, out)`` (HWIO for images, IO for dense layers);
scales are vectors over the last axis.

Deviation from the authors' code: multipliers stay one vector per branch and become the shape
of the kernel only inside the jitted update; for Adam they are ``sum_b |s_b| E_b(1)``, where the
original sums signed scales.
"""

from repopt_jax.branches.blocks import (
    Block,
    check_block,
    check_complete,
    init_weights,
    initial_scales,
    merge,
    pull_back,
)
from repopt_jax.branches.branch import Branch, Full, Identity, is_known, uniform_fan_in, wide_type
from repopt_jax.branches.frozen import frozen_uniform
from repopt_jax.branches.kernels import Centre, Dilated, FrozenPointwise, PooledPointwise, Window
from repopt_jax.branches.matrices import (
    BlockDiagonal,
    Diagonal,
    FoldedConv,
    FoldedDepthwise,
    LowRank,
)
from repopt_jax.branches.multiplier import (
    RULES,
    BranchMult,
    as_layout,
    branch_mult,
    check_layout,
    grad_mults,
    outputs_last,
)
from repopt_jax.branches.sharding import in_auto_mode, placed_like, replicated_like
from repopt_jax.branches.split import ROUNDING, check_merges, split_kernel

__all__ = [
    "ROUNDING",
    "RULES",
    "Block",
    "BlockDiagonal",
    "Branch",
    "BranchMult",
    "Centre",
    "Diagonal",
    "Dilated",
    "FoldedConv",
    "FoldedDepthwise",
    "FrozenPointwise",
    "Full",
    "Identity",
    "LowRank",
    "PooledPointwise",
    "Window",
    "as_layout",
    "branch_mult",
    "check_block",
    "check_complete",
    "check_layout",
    "check_merges",
    "frozen_uniform",
    "grad_mults",
    "in_auto_mode",
    "init_weights",
    "initial_scales",
    "is_known",
    "merge",
    "outputs_last",
    "placed_like",
    "pull_back",
    "replicated_like",
    "split_kernel",
    "uniform_fan_in",
    "wide_type",
]
