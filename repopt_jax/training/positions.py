"""Where the data iterators of all processes are, as text that a checkpoint can hold."""

import json
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def positions_of(iterator: Any) -> list[str]:
    """The iterator's state in every process, as text."""
    state = iterator.get_state()
    text = state.decode() if isinstance(state, bytes) else json.dumps(state)
    if jax.process_count() == 1:
        return [text]
    raw = np.frombuffer(text.encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array(raw.size, np.int32))
    rows = multihost_utils.process_allgather(np.pad(raw, (0, int(sizes.max()) - raw.size)))
    return [bytes(row[:size]).decode() for row, size in zip(rows, sizes, strict=True)]


def move_to(iterator: Any, position: str) -> None:
    """Set the iterator back to where it was when it had this text."""
    as_bytes = isinstance(iterator.get_state(), bytes)  # Grain's DataLoader; its Dataset has dicts
    iterator.set_state(position.encode() if as_bytes else json.loads(position))
