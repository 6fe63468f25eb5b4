"""Where the data iterators of all processes are, as text that a checkpoint can hold."""

import json
from typing import Any

from repopt_jax.training.processes import gathered


def positions_of(iterator: Any) -> list[str]:
    """The iterator's state in every process, as text."""
    state = iterator.get_state()
    text = state.decode() if isinstance(state, bytes) else json.dumps(state)
    return gathered(text)


def move_to(iterator: Any, position: str) -> None:
    """Set the iterator back to where it was when it had this text."""
    as_bytes = isinstance(iterator.get_state(), bytes)  # Grain's DataLoader; its Dataset has dicts
    iterator.set_state(position.encode() if as_bytes else json.loads(position))
