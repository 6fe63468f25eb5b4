"""The state dict of a pickled module, of which only stand-ins are left."""

from typing import Any

import numpy as np

from repopt_jax.torch_files.limits import TorchFileError, quote
from repopt_jax.torch_files.standin import Standin

# About the bytes of all names, one for each entry of a module, those that are None included.
# A module held under n names counts n times: so it does in torch.
MAX_SIZE = 1 << 26


def state_dict(module: Standin) -> dict[str, np.ndarray]:
    """Parameters and buffers of a pickled module by name, as the module itself would list them.

    That is in the order of torch: a module's parameters, its buffers, then its submodules;
    without buffers that are not persistent. Values that a class's own `get_extra_state` or hooks
    would add are unknown without that class and absent.

    Args:
      module: stand-in of an object of any subclass of `torch.nn.Module`.

    Raises:
      TorchFileError: that is no module, it contains itself, its submodules do not end, or it
        holds a parameter that is no plain (say, a quantized or sparse) tensor.

    Example:
      >>> layer = Standin("torch.nn.modules.linear.Linear", ())
      >>> layer.state = {"_parameters": {"weight": np.ones((2, 3)), "bias": None}}
      >>> layer.state |= {"_buffers": {}, "_modules": {}}
      >>> net = Standin("my.Net", ())
      >>> net.state = {"_parameters": {}, "_buffers": {}, "_modules": {"fc": layer}}
      >>> {name: value.shape for name, value in state_dict(net).items()}
      {'fc.weight': (2, 3)}
    """
    result: dict[str, np.ndarray] = {}
    size = 0
    above: set[int] = set()  # modules between the root and the one at hand
    pending: list[tuple[str, Any, bool]] = [("", module, True)]  # last-in first-out
    while pending:
        prefix, current, entering = pending.pop()
        if not entering:
            above.remove(id(current))
            continue
        if id(current) in above:
            raise TorchFileError(f"module {quote(prefix)} contains itself")
        count, tensors, children = _parts(prefix, current)
        size += (60 + len(prefix)) * count
        if size > MAX_SIZE:
            raise TorchFileError("the module has submodules without end")
        for name, value in tensors:
            if not isinstance(value, np.ndarray):
                raise TorchFileError(
                    f"{quote(prefix + name)} is {quote(value)} and no plain tensor"
                )
            result[prefix + name] = value
        above.add(id(current))
        pending.append((prefix, current, False))
        pending.extend((f"{prefix}{name}.", child, True) for name, child in reversed(children))
    return result


def _parts(prefix: str, module: Any) -> tuple[int, list, list]:
    """A module's entries, counted; its named tensors and submodules, without those of None."""
    state = module.state if isinstance(module, Standin) else None
    tables = [
        state.get(key, {}) if isinstance(state, dict) and "_modules" in state else None
        for key in ("_parameters", "_buffers", "_modules")
    ]
    if not all(isinstance(table, dict) for table in tables):
        where = f"{quote(prefix)} is" if prefix else "state_dict needs a pickled module, not"
        kind = repr(module) if isinstance(module, Standin) else quote(module)
        raise TorchFileError(f"{where} {kind}" + (", which is no module" if prefix else ""))
    if not all(isinstance(name, str) for table in tables for name in table):
        raise TorchFileError(f"module {quote(prefix)} has names that are no text")
    parameters, buffers, modules = tables
    hidden = state.get("_non_persistent_buffers_set")
    hidden = hidden.sequence if isinstance(hidden, Standin) else []
    hidden = {name for name in hidden if isinstance(name, str)}
    kept = {name: value for name, value in buffers.items() if name not in hidden}
    tensors = [pair for pair in (*parameters.items(), *kept.items()) if pair[1] is not None]
    children = [pair for pair in modules.items() if pair[1] is not None]
    return 1 + sum(map(len, (*tables, hidden))), tensors, children
