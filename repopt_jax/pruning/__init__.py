"""Pruning by changed gradients, as Optax transformations, and the surgery afterwards.

| paper | while training | afterwards |
|---|---|---|
| GSM | `scale_by_gsm` | `magnitude_masks` |
| C-SGD | `cluster_filters`, `scale_by_csgd` | `merge_clusters` |
| ResRep | `add_compactors`, `scale_by_resrep` | `fold_compactors` |
| AOFP | `Aofp` | `prune_filters` |
"""

from repopt_jax.pruning.aofp import Aofp as Aofp
from repopt_jax.pruning.aofp import AofpState as AofpState
from repopt_jax.pruning.aofp import Follower as Follower
from repopt_jax.pruning.channels import ChannelGroup as ChannelGroup
from repopt_jax.pruning.channels import channel_widths as channel_widths
from repopt_jax.pruning.channels import multiply_adds as multiply_adds
from repopt_jax.pruning.channels import repopt_vgg_channels as repopt_vgg_channels
from repopt_jax.pruning.csgd import ScaleByCsgdState as ScaleByCsgdState
from repopt_jax.pruning.csgd import cluster_filters as cluster_filters
from repopt_jax.pruning.csgd import scale_by_csgd as scale_by_csgd
from repopt_jax.pruning.gsm import magnitude_masks as magnitude_masks
from repopt_jax.pruning.gsm import scale_by_gsm as scale_by_gsm
from repopt_jax.pruning.resrep import CompactedNorm as CompactedNorm
from repopt_jax.pruning.resrep import ScaleByResRepState as ScaleByResRepState
from repopt_jax.pruning.resrep import add_compactors as add_compactors
from repopt_jax.pruning.resrep import fold_compactors as fold_compactors
from repopt_jax.pruning.resrep import is_compactor as is_compactor
from repopt_jax.pruning.resrep import scale_by_resrep as scale_by_resrep
from repopt_jax.pruning.surgery import merge_clusters as merge_clusters
from repopt_jax.pruning.surgery import prune_filters as prune_filters
