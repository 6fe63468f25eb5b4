"""Numpy's arrays in a pickle, which arrive as stand-ins like every other object."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np

from repopt_jax.torch_files.pickles import Standin

# Numpy's module was called numpy.core before version 2.
_MADE_BY = re.compile(r"numpy\._?core\.(?:multiarray\._reconstruct|numeric\._frombuffer)")
MAX_DIMENSIONS = 32


def array_of(value: Any) -> Any:
    """The array of numbers that a stand-in describes; anything else is returned as it is.

    >>> dtype = Standin("numpy.dtype", ("f4", False, True))
    >>> dtype.state = (3, "<", None, None, None, -1, -1, 0)
    >>> value = Standin("numpy.core.multiarray._reconstruct", ())
    >>> value.state = (1, (2,), dtype, False, np.array([1, 2], "<f4").tobytes())
    >>> array_of(value)
    array([1., 2.], dtype=float32)
    """
    if not isinstance(value, Standin) or not _MADE_BY.fullmatch(value.name):
        return value
    if value.name.endswith("_reconstruct"):
        facts = value.state if isinstance(value.state, tuple) else ()
        if len(facts) != 5:
            return value
        _, shape, kind, by_columns, data = facts
        order = "F" if by_columns is True else "C"
    else:  # pickle's protocol 5
        if value.args is None or len(value.args) != 4:
            return value
        data, kind, shape, order = value.args
    dtype = _dtype(kind)
    described = (
        dtype is not None
        and isinstance(data, bytes | bytearray)
        and isinstance(shape, tuple)
        and len(shape) <= MAX_DIMENSIONS
        and all(type(n) is int and 0 <= n < 1 << 31 for n in shape)
        and math.prod(shape) * dtype.itemsize == len(data)
        and order in ("C", "F")
    )
    if not described:
        return value
    array = np.frombuffer(data, dtype).reshape(shape, order=order)
    return array.astype(dtype.newbyteorder("="))


def _dtype(kind: Any) -> np.dtype | None:
    """A type of numbers with its byte order; None for text, records and objects."""
    if not isinstance(kind, Standin) or kind.name != "numpy.dtype" or not kind.args:
        return None
    name, state = kind.args[0], kind.state
    if not isinstance(name, str) or not re.fullmatch(r"b1|[iu][1248]|f[248]|c8|c16", name):
        return None
    order = state[1] if isinstance(state, tuple) and len(state) > 1 else "|"
    return np.dtype(name).newbyteorder(order) if order in ("<", ">", "|", "=") else None
