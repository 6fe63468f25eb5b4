"""PyTorch files in and out, without PyTorch; see `reader` for what and why.

Networks are built only by what `weights` holds: reading files and scales needs numpy alone.
"""

from repopt_jax.torch_files.limits import TorchFileError as TorchFileError
from repopt_jax.torch_files.modules import state_dict as state_dict
from repopt_jax.torch_files.reader import read_torch_file as read_torch_file
from repopt_jax.torch_files.scales import load_torch_scales as load_torch_scales
from repopt_jax.torch_files.scales import official_names as official_names
from repopt_jax.torch_files.scales import read_state_dict as read_state_dict
from repopt_jax.torch_files.standin import Standin as Standin


def __getattr__(name: str):
    """Names of `weights`, which needs JAX."""
    if name in (
        "export_weights",
        "import_weights",
        "load_torch_weights",
        "load_weights",
        "recognize",
    ):
        from repopt_jax.torch_files import weights

        return getattr(weights, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
