"""Files are opened by their content."""

import numpy as np
import pytest

from repopt_jax import Scales, load_scales, save_scales

VECTORS = {"conv": {"full": np.array([1.0, 2.0], np.float32)}}


@pytest.mark.parametrize("first", [b"\x80", b"PK"], ids=["pickle", "zip"])
def test_scales_whose_header_has_a_length_that_looks_like_torch(first, tmp_path):
    """The file begins with the header's length, here the first bytes of torch's formats."""
    path = tmp_path / "scales.safetensors"
    save_scales(path, Scales(VECTORS, {"note": ""}))
    length = int.from_bytes(path.read_bytes()[:8], "little")
    wanted = int.from_bytes(first, "little")
    spaces = (wanted - length) % 256 ** len(first)
    # One text of metadata has at most 500 characters; each of these takes 400 bytes.
    notes = {f"note{i:03}": " " * 387 for i in range(spaces // 400)}
    save_scales(path, Scales(VECTORS, {"note": " " * (spaces % 400)} | notes))
    assert path.read_bytes().startswith(first)
    np.testing.assert_array_equal(load_scales(path)["conv"]["full"], [1, 2])
