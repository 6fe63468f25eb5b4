"""Imports between the rooms of the package point one way: no circle, and data knows no model."""

import ast
import pathlib

PACKAGE = pathlib.Path(__file__).parents[1] / "repopt_jax"

# Each room imports only rooms above it in this list, which is that of CONTRIBUTING.md.
ROOMS = (
    *("extras", "imagenet", "atomic_write", "file_lock", "messages", "tree_paths"),
    *("branches", "transforms", "weight_decay", "reparameterization", "scales", "pruning"),
    *("models", "torch_files", "files", "hub", "check_equivalence"),
    *("data", "training", "deploy", "convert"),
)
BESIDES_DATA = {"extras", "imagenet", "atomic_write", "file_lock"}  # none of which loads JAX


def imported_modules(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "repopt_jax":
            yield from (f"repopt_jax.{name.name}" for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
        elif isinstance(node, ast.Import):
            yield from (name.name for name in node.names)


def rooms_imported():
    """Pairs of a room and one that it imports; `repopt_jax` itself belongs to no room."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        room = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for module in imported_modules(ast.parse(path.read_text())):
            if module.startswith("repopt_jax.") and room != "__init__":
                found.add((room, module.split(".")[1]))
    return {(room, other) for room, other in found if room != other}


def test_every_room_has_its_place():
    names = {p.name.removesuffix(".py") for p in PACKAGE.iterdir() if p.suffix in ("", ".py")}
    assert names - {"__init__", "__pycache__"} == set(ROOMS)


def test_imports_point_up_the_list():
    wrong = {(r, o) for r, o in rooms_imported() if ROOMS.index(o) > ROOMS.index(r)}
    assert wrong == set()


def test_data_knows_no_model():
    assert {other for room, other in rooms_imported() if room == "data"} <= BESIDES_DATA
