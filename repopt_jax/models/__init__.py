"""Networks in Flax NNX and the functions that turn one kind into another."""

from repopt_jax.models.branched_layers import check_layer as check_layer
from repopt_jax.models.branched_layers import find_blocks as find_blocks
from repopt_jax.models.create import create_model as create_model
from repopt_jax.models.mobileone import MobileOne as MobileOne
from repopt_jax.models.replknet import RepLKNet as RepLKNet
from repopt_jax.models.repmlpnet import RepMLPNet as RepMLPNet
from repopt_jax.models.repopt_ghost import RepOptGhost as RepOptGhost
from repopt_jax.models.repopt_vgg import RepOptVGG as RepOptVGG
from repopt_jax.models.search import SearchLayer as SearchLayer
from repopt_jax.models.search import search_layers as search_layers
from repopt_jax.models.search import search_network as search_network
from repopt_jax.models.search import searched_scales as searched_scales
from repopt_jax.models.target import Target as Target
from repopt_jax.models.target import init_target as init_target
from repopt_jax.models.target import start_scales as start_scales
from repopt_jax.models.target import target_network as target_network
from repopt_jax.models.yolov6 import YOLOv6 as YOLOv6
