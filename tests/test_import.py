"""Importing the package loads nothing that only training needs."""

import subprocess
import sys

HEAVY = """clu cv2 grain matplotlib ml_collections orbax safetensors sklearn tensorboardX tensorflow
    tensorflow_datasets torch"""

CODE = f"""
import repopt_jax
[getattr(repopt_jax, name) for name in dir(repopt_jax)]
import sys
print(*[name for name in {HEAVY!r}.split() if name in sys.modules])
"""


def test_a_fresh_import_of_all_public_names_loads_nothing_heavy():
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
