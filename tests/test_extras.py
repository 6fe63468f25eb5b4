"""A package of a missing extra ends in one sentence with the command that installs it."""

import contextlib
import importlib
import subprocess
import sys
from unittest import mock

import pytest

from repopt_jax.extras import needs_extra


def without(package, code):
    """Runs code in a Python where `package` cannot be imported."""
    code = f"import sys\nsys.modules[{package!r}] = None\n{code}"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


@contextlib.contextmanager
def hidden(package):
    """Our modules are imported anew, and `package` cannot be imported."""
    with mock.patch.dict(sys.modules):
        for name in list(sys.modules):
            if name.split(".")[0] in (package, "repopt_jax"):
                del sys.modules[name]
        sys.modules[package] = None
        yield


def test_a_program_ends_with_one_sentence_and_status_1():
    code = """
from repopt_jax.extras import needs_extra
with needs_extra("train", command="repopt-train"):
    import grain
"""
    done = without("grain", code)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "repopt-train: grain is missing: pip install 'repopt_jax[train]'\n"


def test_the_outermost_block_names_the_extra():
    told = pytest.raises(ModuleNotFoundError, match=r"'repopt_jax\[deploy\]'$")
    with told, needs_extra("deploy"), needs_extra("train"):
        import a_package_that_nobody_has  # noqa: F401


def test_our_own_mistakes_are_no_missing_extras():
    told = pytest.raises(ModuleNotFoundError, match=r"^No module named 'repopt_jax\.mistyped'$")
    with told, needs_extra("train"):
        import repopt_jax.mistyped  # noqa: F401


@pytest.mark.parametrize("package", ["grain", "cv2", "simplejpeg", "PIL"])
def test_importing_data_without_its_packages_names_the_command(package):
    told = pytest.raises(ModuleNotFoundError, match=rf"^{package} is .* 'repopt_jax\[train\]'$")
    with hidden(package), told:
        importlib.import_module("repopt_jax.data")


@pytest.mark.parametrize("package", ["onnxruntime", "onnx", "grain", "tqdm"])
def test_the_command_deploy_names_its_extra(package, capsys):
    with hidden(package), pytest.raises(SystemExit, match=r"^1$"):
        importlib.import_module("repopt_jax.deploy.command_line").main(["benchmark", "a.onnx"])
    sentence = f"{package} is missing: pip install 'repopt_jax[deploy]'"
    assert capsys.readouterr() == ("", f"repopt-deploy: {sentence}\n")


def test_importing_onnx_export_without_onnx_names_the_command():
    told = pytest.raises(ModuleNotFoundError, match=r"^onnx is .* 'repopt_jax\[deploy\]'$")
    with hidden("onnx"), told:
        importlib.import_module("repopt_jax.deploy.onnx_export")


@pytest.mark.parametrize("package", ["absl", "ml_collections", "clu", "grain"])
def test_the_command_train_names_its_extra(package):
    code = "import sys\nsys.argv = ['repopt-train', '--mode=eval', '--workdir=nowhere']\n"
    code += "from repopt_jax.training.command_line import main\nmain()"
    done = without(package, code)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"repopt-train: {package} is missing: pip install 'repopt_jax[train]'\n"
