"""The circumstances of a measurement, which every JSON file of results states."""

import importlib.metadata
import os
import pathlib
import platform
import shutil
import subprocess
import sys

REPOSITORY = pathlib.Path(__file__).parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results"
REAL_IMAGES = REPOSITORY.parent / "shared" / "tfds"  # beside the checkout, on some machines


def environment(*packages: str) -> dict:
    """Commit, Python, versions of `packages`, processor, and JAX's devices where JAX is in use."""
    made = (":!README.md", ":!docs/results.md", ":!benchmarks/results")  # measuring changes these
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", *made)
    info = pathlib.Path("/proc/cpuinfo")  # on Linux
    lines = [line.split(":") for line in info.read_text().splitlines()] if info.exists() else []
    facts = {line[0].strip(): line[1].strip() for line in lines if len(line) == 2}
    affinity = getattr(os, "sched_getaffinity", None)
    found = {
        "commit": _git("rev-parse", "--short", "HEAD") or None,
        "uncommitted_changes": bool(changed),
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in packages},
        "cpu": facts.get("model name", platform.machine()),
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        # Whether one instruction of the processor multiplies int8 and adds up.
        "vnni": bool({"avx512_vnni", "avx_vnni"} & set(facts.get("flags", "").split())),
    }
    if "jax" in sys.modules:
        found["devices"] = [device.device_kind for device in sys.modules["jax"].devices()]
    return found


def _git(*arguments: str) -> str:
    if shutil.which("git") is None:
        return ""
    command = ["git", "-C", str(REPOSITORY), *arguments]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def _version(package: str) -> str | None:
    """The installed version. None: the package is not installed."""
    for name in (package, f"{package}-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None
