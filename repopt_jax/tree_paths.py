"""Paths: one way to name a parameter or a layer, ``stage1/0/conv/kernel``."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

# Names below `blocks/<stage>/<block>/` of RepOpt-GhostNet, and of no network of other makers.
_OLD_STAGES = re.compile(
    r"(^|/)blocks/(?=\d/\d/(?:ghost[12]/|shortcut/(?:conv|bn)_|se/(?:down|up)/"
    r"|(?:conv_dw|conv)/kernel|(?:bn_dw|bn1)/(?:scale|bias|mean|var)\b))"
)


def path_str(path: tuple) -> str:
    """A leaf's key path joined by slashes, the same for a nested dict and an `nnx.State`.

    >>> import jax
    >>> [path_str(p) for p, _ in jax.tree_util.tree_leaves_with_path({"a": [{"kernel": 1}]})]
    ['a/0/kernel']
    """
    if path and path[-1] == jax.tree_util.GetAttrKey("value"):  # what nnx.Variable appends
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator="/")


def current_path(path: str) -> str:
    """The path of today for one from a file, which an earlier version may have written.

    The stages of RepOpt-GhostNet were once called ``blocks``. All other paths stay, also in
    networks with ``blocks`` of their own.

    >>> current_path("blocks/0/0/ghost1/cheap_conv/conv")
    'stages/0/0/ghost1/cheap_conv/conv'
    >>> current_path("params/blocks/9/0/conv/kernel/value")
    'params/stages/9/0/conv/kernel/value'
    >>> current_path("blocks/0/conv/conv3x3")
    'blocks/0/conv/conv3x3'
    """
    return _OLD_STAGES.sub(r"\1stages/", path)


def by_path(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> dict[str, Any]:
    """The leaves of any pytree by their paths, with `is_leaf` as `jax.tree.leaves` takes it.

    >>> by_path({"conv": {"kernel": 1}, "momentum": (2, None)})
    {'conv/kernel': 1, 'momentum/0': 2}
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
    return {path_str(path): leaf for path, leaf in leaves}


def check_updates(updates: Any, params: Any | None) -> None:
    """Refuse updates of other shapes than their parameters', such as one per sample.

    Args:
      updates: any pytree.
      params: with the paths of `updates`. None: nothing is checked.

    >>> check_updates({"kernel": np.ones((8, 2, 3))}, {"kernel": np.ones((2, 3))})
    Traceback (most recent call last):
    ValueError: updates['kernel'] must have its parameter's shape (2, 3), got (8, 2, 3)
    """
    if params is None:
        return
    shapes = {path: np.shape(param) for path, param in by_path(params).items()}
    for path, update in by_path(updates).items():
        if path in shapes and np.shape(update) != shapes[path]:
            raise ValueError(
                f"updates[{path!r}] must have its parameter's shape {shapes[path]}, got "
                f"{np.shape(update)}"
            )


def parent_and_key(model: Any, path: str) -> tuple[Any, str]:
    """The module that holds the layer at `path`, and the layer's name or index in it."""
    *parents, key = path.split("/")
    for part in parents:
        model = _child(model, part)
    return model, key


def _child(parent: Any, key: str) -> Any:
    """What a module, a list, a tuple or a dict holds under a name or an index."""
    if isinstance(parent, Mapping):
        return parent[key] if key in parent else parent[int(key)]
    return getattr(parent, key) if hasattr(parent, key) else parent[int(key)]


def layer_at(model: Any, path: str) -> Any:
    """The layer of `model` at `path`.

    Raises:
      ValueError: if there is none.

    >>> from flax import nnx
    >>> layer_at(nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0))), "layers/0").out_features
    3
    """
    try:
        return _child(*parent_and_key(model, path))
    except (AttributeError, IndexError, KeyError, TypeError, ValueError):
        raise ValueError(
            f"path must name a layer of {type(model).__name__}, got {path!r}"
        ) from None


@contextlib.contextmanager
def errors_at(place: str) -> Iterator[None]:
    """Begin the message of a ValueError with the place that it is about.

    >>> with errors_at("block 'conv'"):
    ...     raise ValueError("groups must be 1, got 2")
    Traceback (most recent call last):
    ValueError: block 'conv': groups must be 1, got 2
    """
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from None
