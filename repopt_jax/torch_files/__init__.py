"""Reading PyTorch checkpoints without PyTorch; see `reader` for what and why."""

from repopt_jax.torch_files.limits import TorchFileError as TorchFileError
from repopt_jax.torch_files.modules import state_dict as state_dict
from repopt_jax.torch_files.reader import read_torch_file as read_torch_file
from repopt_jax.torch_files.standin import Standin as Standin
