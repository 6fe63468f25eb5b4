"""Linear branches: a re-parameterized kernel stated once, everything else derived.

A re-parameterized kernel is a sum of linear branches (RepOptimizers, arXiv 2205.15242,
section 3)::

    W = sum_b s_b * E_b(w_b)

``w_b`` is the weight of branch ``b``, ``E_b`` the linear map that places it inside the big
kernel and ``s_b`` a constant per output channel. A *block* states its branches as data, for
RepOpt-VGG ``{"conv3x3": Full(), "conv1x1": Centre(1), "identity": Identity()}``. From this
statement alone follow the merged kernel, the Rule of Initialization, the multipliers of the
Rule of Iteration and, through ``jax.linear_transpose``, the exact operator for any branch.

Layout: kernels are ``(*window, in / groups, out)`` (HWIO for images, IO for dense layers);
scales are vectors over the last axis.

Deviation from the authors' code: multipliers stay one vector per branch and become the shape
of the kernel only inside the jitted update; for Adam they are ``sum_b |s_b| E_b(1)``, where the
original sums signed scales.
"""

from repopt_jax.branches.blocks import Block as Block
from repopt_jax.branches.blocks import check_block as check_block
from repopt_jax.branches.blocks import init_weights as init_weights
from repopt_jax.branches.blocks import initial_scales as initial_scales
from repopt_jax.branches.blocks import merge as merge
from repopt_jax.branches.blocks import pull_back as pull_back
from repopt_jax.branches.branch import Branch as Branch
from repopt_jax.branches.branch import Full as Full
from repopt_jax.branches.branch import Identity as Identity
from repopt_jax.branches.branch import uniform_fan_in as uniform_fan_in
from repopt_jax.branches.branch import wide_type as wide_type
from repopt_jax.branches.frozen import frozen_uniform as frozen_uniform
from repopt_jax.branches.kernels import Centre as Centre
from repopt_jax.branches.kernels import Dilated as Dilated
from repopt_jax.branches.kernels import FrozenPointwise as FrozenPointwise
from repopt_jax.branches.kernels import PooledPointwise as PooledPointwise
from repopt_jax.branches.kernels import Window as Window
from repopt_jax.branches.matrices import BlockDiagonal as BlockDiagonal
from repopt_jax.branches.matrices import Diagonal as Diagonal
from repopt_jax.branches.matrices import FoldedConv as FoldedConv
from repopt_jax.branches.matrices import LowRank as LowRank
from repopt_jax.branches.multiplier import RULES as RULES
from repopt_jax.branches.multiplier import BranchMult as BranchMult
from repopt_jax.branches.multiplier import branch_mult as branch_mult
