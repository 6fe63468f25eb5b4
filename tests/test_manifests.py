"""Fingerprints see every changed bit, and see the same under every sharding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from repopt_jax.training.manifests import fingerprint, seal, unseal

TYPES = ["float32", "bfloat16", "float16", "int32", "uint8", "int8", "complex64", "bool"]


def draw(dtype, shape=(4, 6)):
    return jnp.asarray(np.random.default_rng(0).integers(0, 2, shape)).astype(dtype)


@pytest.mark.parametrize("dtype", TYPES)
def test_one_changed_number_changes_the_fingerprint(dtype):
    x = np.asarray(draw(dtype))
    prints = {tuple(fingerprint(x).tolist())}
    for place in np.ndindex(x.shape):
        changed = x.copy()
        changed[place] = 1 - changed[place]
        prints.add(tuple(fingerprint(changed).tolist()))
    assert len(prints) == x.size + 1


def test_sixty_four_bit_numbers_count_with_all_their_bits(x64):
    x = np.arange(3.0)
    assert fingerprint(x).tolist() != fingerprint(np.nextafter(x, 9)).tolist()
    high = x.view(np.uint64) ^ np.uint64(1 << 40)
    assert fingerprint(x).tolist() != fingerprint(high.view(np.float64)).tolist()


def test_signs_changed_in_pairs_change_the_fingerprint():
    """Sums of the bits as they are would not see it: the top bits of two numbers cancel."""
    x = jnp.array([1.0, 2.0, 3.0])
    assert fingerprint(x).tolist() != fingerprint(x.at[:2].multiply(-1)).tolist()


def test_exchanged_rows_change_the_fingerprint():
    x = jnp.arange(12.0).reshape(4, 3)
    assert fingerprint(x).tolist() != fingerprint(x[::-1]).tolist()


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("spec", [P(), P("a"), P(None, "b"), P("b", "a"), P(("a", "b"))])
def test_fingerprint_is_the_same_under_every_sharding(spec, axis_type):
    x = np.random.default_rng(0).normal(size=(8, 12)).astype(np.float32)
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(axis_type,) * 2)
    sharded = jax.device_put(x, NamedSharding(mesh, spec))
    assert fingerprint(sharded).tolist() == fingerprint(x).tolist()


def test_sealed_content_that_was_changed_is_refused():
    sealed = seal({"position": 12})
    sealed["content"]["position"] = 13
    with pytest.raises(ValueError, match="not what was written"):
        unseal(sealed)


def test_imaginary_parts_count():
    x = jnp.array([1 + 2j, 3j])
    assert fingerprint(x).tolist() != fingerprint(x.conj()).tolist()


def test_fingerprints_of_earlier_versions_are_still_the_same():
    """Another hash would call every checkpoint damaged that is already written."""
    x = jnp.arange(6, dtype=jnp.float32).reshape(2, 3)
    assert fingerprint(x).tolist() == [3757635346, 660828913]  # as commit 72e0e07 computes
