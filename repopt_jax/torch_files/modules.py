"""The weights inside what `read_torch_file` returned: state dicts and pickled modules."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from repopt_jax.torch_files.pickles import Standin, TorchFileError, quote
from repopt_jax.torch_files.reader import read_torch_file

# Keys under which checkpoints keep their weights, the likeliest first.
WEIGHT_KEYS = ("model", "state_dict", "model_state_dict", "net", "ema", "model_ema")
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
        tables = _tables(prefix, current)
        size += (60 + len(prefix)) * (1 + sum(map(len, tables)))
        if size > MAX_SIZE:
            raise TorchFileError("the module has submodules without end")
        parameters, buffers, modules, hidden = tables
        kept = {name: value for name, value in buffers.items() if name not in hidden}
        for name, value in (*parameters.items(), *kept.items()):
            if isinstance(value, np.ndarray):
                result[prefix + name] = value
            elif value is not None:
                found = f"{quote(prefix + name)} is {quote(value)}"
                raise TorchFileError(f"{found} and no plain tensor")
        above.add(id(current))
        pending.append((prefix, current, False))
        children = [(f"{prefix}{name}.", child, True) for name, child in modules.items()]
        pending.extend(child for child in reversed(children) if child[1] is not None)
    return result


def _tables(prefix: str, module: Any) -> tuple[dict, dict, dict, set]:
    """A module's parameters, buffers, submodules, and names of buffers that do not persist."""
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
    hidden = getattr(state.get("_non_persistent_buffers_set"), "sequence", ())
    return *tables, {name for name in hidden if isinstance(name, str)}


def find_state_dict(content: Any) -> dict[str, np.ndarray]:
    """The weights inside what `read_torch_file` returned.

    Checkpoints that keep them under ``model``, ``state_dict`` or ``ema`` are unwrapped, pickled
    modules turned into their state dict, and a prefix ``module.`` of all names is removed.

    Raises:
      TorchFileError: there are none.

    >>> list(find_state_dict({"model": {"module.a": np.ones(1)}, "epoch": 3}))
    ['a']
    """
    for _ in range(4):
        if isinstance(content, Standin):
            content = state_dict(content)
        if not isinstance(content, dict):
            raise TorchFileError(f"it holds a {type(content).__name__} and no weights")
        arrays = {k: v for k, v in content.items() if isinstance(v, np.ndarray)}
        if arrays and len(arrays) == len(content) and all(isinstance(k, str) for k in arrays):
            while all(name.startswith("module.") for name in arrays):
                arrays = {name.removeprefix("module."): v for name, v in arrays.items()}
            return arrays
        inner = [k for k in WEIGHT_KEYS if isinstance(content.get(k), (dict, Standin))]
        if not inner:
            break
        content = content[inner[0]]
    raise TorchFileError(
        f"it has no weights under any of {', '.join(WEIGHT_KEYS)}, but {[*map(str, content)][:8]}"
    )


def read_state_dict(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The weights of a torch file by name; see `find_state_dict`.

    Raises:
      TorchFileError: with the file's name and what is wrong with it.
    """
    content = read_torch_file(path)
    try:
        return find_state_dict(content)
    except TorchFileError as error:
        raise TorchFileError(f"{os.fspath(path)} cannot be used: {error}") from None
