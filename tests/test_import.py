"""Importing the package loads nothing that only training needs."""

import subprocess
import sys

import pytest

HEAVY = """clu cv2 grain matplotlib ml_collections orbax safetensors sklearn tensorboardX tensorflow
    tensorflow_datasets torch"""

IMPORTS = {
    "the package": "import repopt_jax",
    "all public names": "import repopt_jax\n[getattr(repopt_jax, n) for n in dir(repopt_jax)]",
}


@pytest.mark.parametrize("what", IMPORTS)
def test_a_fresh_import_loads_nothing_heavy(what):
    code = (
        f"{IMPORTS[what]}\nimport sys\nprint(*[n for n in {HEAVY!r}.split() if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
