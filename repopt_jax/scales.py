"""Scales: the result of a search, from which a RepOptimizer is built.

One float32 vector per branch of every block, shape ``(out,)``. For scaled branches it is the
constant ``s_b``; for ``identity`` it is the value at which the search left the trainable vector,
used only to initialize the target (RepOptimizers, arXiv 2205.15242, section 3.3).

File format: safetensors with one vector per key ``<layer path>/<branch>``, such as
``stage1/0/conv/conv1x1``, and string metadata: ``format_version``, ``model``, ``source`` and,
after a search, ``dataset`` and ``top1``.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from repopt_jax.messages import check_names, listed, quote

if TYPE_CHECKING:
    from jaxtyping import Float

    from repopt_jax.branches import Block

FORMAT_VERSION = "1"
MAX_FACT = 500  # characters of a name or a value in the metadata


@dataclasses.dataclass(frozen=True, eq=False)
class Scales(Mapping):
    """Path of a layer -> branch name -> vector.

    Attributes:
      vectors: path -> branch -> float32 array of shape ``(out,)``.
      metadata: facts about their origin, strings only.

    >>> scales = Scales({"conv": {"conv3x3": np.array([1.0, -2.0]), "identity": np.ones(2)}})
    >>> scales
    <Scales of 1 blocks>
    >>> scales["conv"]["conv3x3"].tolist()
    [1.0, -2.0]
    >>> print(scales.describe())
    block  branch    channels    mean     min    max  negative  largest multiplier
    conv   conv3x3          2  -0.500  -2.000  1.000     50.0%               5.000
    conv   identity         2   1.000   1.000  1.000      0.0%
    """

    vectors: Mapping[str, Mapping[str, Float[np.ndarray, " out"]]]
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __getitem__(self, path: str) -> Mapping[str, Float[np.ndarray, " out"]]:
        return self.vectors[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self.vectors)

    def __len__(self) -> int:
        return len(self.vectors)

    def __repr__(self) -> str:
        facts = "".join(f", {key} {value!r}" for key, value in self.metadata.items())
        return f"<Scales of {len(self)} blocks{facts}>"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Scales):
            return NotImplemented
        mine, theirs = self.flat(), other.flat()
        if mine.keys() != theirs.keys() or dict(self.metadata) != dict(other.metadata):
            return False
        return all(np.array_equal(mine[key], theirs[key]) for key in mine)

    @classmethod
    def initial(cls, model: Any, blocks: Mapping[str, Block] | None = None) -> Scales:
        """The vectors with which a search of `model` starts (an ablation of the paper).

        Args:
          model: a plain network.
          blocks: path of a layer -> its branches. None: those that the network states.

        >>> from flax import nnx
        >>> from repopt_jax import Full
        >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
        >>> scales = Scales.initial(model, {"layers/0": {"full": Full(scale=2.0)}})
        >>> scales["layers/0"]["full"].tolist()
        [2.0, 2.0, 2.0]
        """
        from repopt_jax.branches import initial_scales
        from repopt_jax.tree_paths import layer_at

        vectors = {
            path: initial_scales(block, layer_at(model, path).kernel.shape)
            for path, block in blocks_of(model, blocks).items()
        }
        return cls(vectors, {})._map(np.asarray, "initial values of the search")

    def ones(self) -> Scales:
        """The same blocks with every value 1 (an ablation of the paper)."""
        return self._map(np.ones_like, "all ones")

    def averaged(self) -> Scales:
        """Every vector replaced by its mean over the channels (an ablation of the paper)."""
        return self._map(lambda v: np.full_like(v, v.mean()), "averaged per layer")

    def _map(self, function, source: str) -> Scales:
        vectors = {
            path: {name: function(vector) for name, vector in block.items()}
            for path, block in self.vectors.items()
        }
        return Scales(vectors, {**self.metadata, "source": source})

    def check(self, model: Any, blocks: Mapping[str, Block] | None = None) -> None:
        """Refuse scales that do not fit `model`: blocks, branches and widths must agree.

        So must the seeds of frozen factors, where the search noted them in the metadata.

        Args:
          model: a plain network.
          blocks: path of a layer -> its branches. None: those that the network states.

        Raises:
          ValueError: one message with what is missing, surplus, of the wrong width or not finite.
        """
        from repopt_jax.tree_paths import layer_at

        blocks = blocks_of(model, blocks)
        wanted = {
            f"{path}/{name}": layer_at(model, path).kernel.shape[-1]
            for path, block in blocks.items()
            for name in block
        }
        found = self.flat()
        problems = [f"missing {key}" for key in wanted.keys() - found.keys()]
        problems += [f"surplus {key}" for key in found.keys() - wanted.keys()]
        for key in wanted.keys() & found.keys():
            if found[key].shape != (wanted[key],):
                problems.append(f"{key} must have shape ({wanted[key]},), got {found[key].shape}")
            elif not np.isfinite(found[key]).all():
                problems.append(f"{key} must be finite")
        for key, seed in frozen_seeds(blocks).items():
            if self.metadata.get(key, seed) != seed:
                problems.append(f"{key} must be {seed}, got {self.metadata[key]}")
        if problems:
            name = self.metadata.get("model")
            of = {None: "", "unknown": " of no network of ours"}.get(name, f" of {name}")
            raise ValueError(f"scales{of} do not fit the model: {listed(sorted(problems))}")

    def flat(self) -> dict[str, Float[np.ndarray, " out"]]:
        """The vectors by ``<layer path>/<branch>``, the keys of the file."""
        return {
            f"{path}/{name}": np.asarray(vector)
            for path, block in self.vectors.items()
            for name, vector in block.items()
        }

    def describe(self, by: str = "block") -> str:
        """A table of mean, min, max, share of negatives and the largest multiplier.

        The largest multiplier is that of SGD at the kernel's centre, where all branches meet:
        the largest ``sum_b s_b^2`` of a channel, with 1 for ``identity``.

        Args:
          by: "block" for a row per branch of every block, "stage" for a row per branch and first
            part of the path.

        Raises:
          ValueError: if `by` is neither.
        """
        if by not in ("block", "stage"):
            raise ValueError(f"by must be 'block' or 'stage', got {by!r}")
        groups: dict[str, dict[str, list[np.ndarray]]] = {}
        largest: dict[str, float] = {}
        for path, block in self.vectors.items():
            group = path if by == "block" else path.split("/")[0]
            for name, vector in block.items():
                groups.setdefault(group, {}).setdefault(name, []).append(vector)
            squares = [np.square(v) if n != "identity" else 1.0 for n, v in block.items()]
            largest[group] = max(largest.get(group, 0.0), float(np.max(sum(squares))))
        rows = [(by, "branch", "channels", "mean", "min", "max", "negative", "largest multiplier")]
        for group, branches in groups.items():
            for index, (name, parts) in enumerate(branches.items()):
                v = np.concatenate(parts)
                numbers = [f"{x:.3f}" for x in (v.mean(), v.min(), v.max())]
                mult = f"{largest[group]:.3f}" if index == 0 else ""
                rows.append((group, name, str(v.size), *numbers, f"{(v < 0).mean():.1%}", mult))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        aligned = [
            "  ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(cells))
            for cells in ([*zip(row, widths, strict=True)] for row in rows)
        ]
        return "\n".join(line.rstrip() for line in aligned)


def blocks_of(model: Any, blocks: Mapping[str, Block] | None = None) -> Mapping[str, Block]:
    """`blocks` if given, or those that `model` states.

    Raises:
      ValueError: None for a model without a method ``blocks()``.
    """
    if blocks is not None:
        return blocks
    if not hasattr(model, "blocks"):
        raise ValueError(
            f"blocks must be given for a model that does not state its own, got None for a "
            f"{type(model).__name__}"
        )
    return model.blocks()


def check_scales(
    scales: Mapping[str, Mapping[str, Any]], model: Any, blocks: Mapping[str, Block]
) -> None:
    """`Scales.check` for any mapping of that form."""
    (scales if isinstance(scales, Scales) else Scales(scales)).check(model, blocks)


def frozen_seeds(blocks: Mapping[str, Block]) -> dict[str, str]:
    """The seeds of frozen factors as metadata: scales only fit the factors they were found with.

    >>> from repopt_jax import LowRank
    >>> frozen_seeds({"dense": {"low_rank": LowRank(2, seed=7)}})
    {'seed of dense/low_rank': '7'}
    """
    return {
        f"seed of {path}/{name}": str(branch.seed)
        for path, block in blocks.items()
        for name, branch in block.items()
        if hasattr(branch, "seed")
    }


def save_scales(path: str | os.PathLike, scales: Scales) -> None:
    """Write `scales` as a safetensors file, replacing `path` only once it is complete.

    >>> import repopt_jax, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_scales(f"{folder}/s.safetensors", Scales({"conv": {"full": np.ones(2)}}))
    ...     repopt_jax.load_scales(f"{folder}/s.safetensors")["conv"]["full"].tolist()
    [1.0, 1.0]
    """
    import json

    from safetensors.numpy import save

    from repopt_jax.atomic_write import atomic_write

    tensors = {key: np.array(v, np.float32) for key, v in scales.flat().items()}
    metadata = {"format_version": FORMAT_VERSION, **scales.metadata}
    data = save(tensors, metadata)
    # safetensors writes metadata in any order; equal scales must give equal files.
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with atomic_write(path) as unfinished:
        unfinished.write_bytes(len(header).to_bytes(8, "little") + header + data[end:])


def parse_safetensors(data: bytes, name: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays and the metadata of a safetensors file.

    Raises:
      ValueError: `data` is no such file, or has a name that cannot be printed.
    """
    import json

    import ml_dtypes
    from safetensors import SafetensorError, deserialize

    from repopt_jax.tree_paths import errors_at

    types = {
        **{"BOOL": "?", "U8": "u1", "U16": "u2", "U32": "u4", "U64": "u8"},
        **{"I8": "i1", "I16": "i2", "I32": "i4", "I64": "i8", "C64": "c8"},
        **{"F16": "f2", "F32": "f4", "F64": "f8", "BF16": ml_dtypes.bfloat16},
        **{"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2},
    }
    try:
        arrays = {
            key: np.frombuffer(part["data"], types[part["dtype"]]).reshape(part["shape"])
            for key, part in deserialize(data)
        }
        # The header is JSON after its length in 8 bytes.
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    except (SafetensorError, ValueError, KeyError) as error:
        raise ValueError(
            f"{name!r} must be a safetensors file: {ascii(str(error))[:200]}"
        ) from None
    with errors_at(f"{name!r} cannot be used"):
        check_names(arrays)
    return arrays, header.get("__metadata__", {})


def check_own(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str], name: str) -> None:
    """Refuse what no safetensors file of ours holds.

    Args:
      arrays: of the file.
      metadata: of the file.
      name: of the file, for messages.

    Raises:
      ValueError: another format version, metadata that would spoil a message, or arrays of other
        numbers than floats.
    """
    version = metadata.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{name!r} must have the format_version {FORMAT_VERSION}, got {quote(version)}"
        )
    for text in (*metadata, *metadata.values()):
        if len(text) > MAX_FACT or not text.isprintable():
            raise ValueError(
                f"metadata of {name!r} must be printable text of at most {MAX_FACT} characters, "
                f"got {quote(text)}"
            )
    others = [f"{key} of {v.dtype}" for key, v in arrays.items() if v.dtype.kind in "biuc"]
    if others:
        raise ValueError(f"{name!r} must hold floats, got {listed(others, ', ')}")


def parse_scales(data: bytes, name: str) -> Scales:
    """The scales of a safetensors file, of this version or an earlier one.

    Args:
      data: the bytes of the file.
      name: of the file, for messages.

    Raises:
      ValueError: `data` is no such file.
    """
    from repopt_jax.tree_paths import current_path

    flat, metadata = parse_safetensors(data, name)
    check_own(flat, metadata, name)
    vectors: dict[str, dict[str, np.ndarray]] = {}
    for key in sorted(flat, key=in_network_order):
        path, _, branch = current_path(key).rpartition("/")
        if not path or flat[key].ndim != 1:
            raise ValueError(
                f"{name!r} must hold vectors named <layer path>/<branch>, got {key!r} of shape "
                f"{flat[key].shape}"
            )
        vectors.setdefault(path, {})[branch] = flat[key].astype(np.float32)
    return Scales(vectors, metadata)


def in_network_order(key: str) -> list[tuple[int, int, str]]:
    """Sort ``stage1/2`` before ``stage1/10``."""
    return [(0, int(p), "") if p.isdecimal() else (1, 0, p) for p in key.split("/")]
