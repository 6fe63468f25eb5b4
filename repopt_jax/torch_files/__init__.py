"""Reading and writing PyTorch files without PyTorch; see `reader`.

Names are loaded when they are first used: reading files needs numpy, networks need JAX.
"""

from etils import epy as _epy

with _epy.lazy_api_imports(globals()):
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
