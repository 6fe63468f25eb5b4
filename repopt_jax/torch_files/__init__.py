"""Reading and writing PyTorch files without PyTorch; see `reader`."""

from repopt_jax.torch_files.modules import read_state_dict as read_state_dict
from repopt_jax.torch_files.modules import state_dict as state_dict
from repopt_jax.torch_files.pickles import Standin as Standin
from repopt_jax.torch_files.pickles import TorchFileError as TorchFileError
from repopt_jax.torch_files.reader import read_torch_file as read_torch_file
from repopt_jax.torch_files.recognition import recognize as recognize
from repopt_jax.torch_files.scales import load_torch_scales as load_torch_scales
from repopt_jax.torch_files.scales import official_names as official_names
from repopt_jax.torch_files.weights import export_weights as export_weights
from repopt_jax.torch_files.weights import import_weights as import_weights
from repopt_jax.torch_files.weights import load_torch_weights as load_torch_weights
