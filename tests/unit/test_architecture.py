"""Imports point one way, and torchtitan is known in one folder."""

import ast
from pathlib import Path

import pytest

import sgt_titan

PACKAGE = Path(sgt_titan.__file__).parent
CLIENT = {"errors", "config", "transform", "objectives", "metrics", "data", "demo", "checkpoint", "export"}

# area -> areas it may import, lazily or not. `titan` and `evaluation` do not know each other.
MAY_IMPORT = {
    "errors": set(),
    "arguments": {"errors"},
    "folders": {"errors"},
    "config": {"errors"},
    "checkpoint": set(),
    "cluster": {"errors", "folders", "arguments", "checkpoint", "config"},
    "transform": {"errors", "folders"},
    "objectives": {"errors"},
    "metrics": {"errors"},
    "demo": {"errors", "transform", "config", "cli", "evaluation"},
    "data": {"errors", "config", "transform", "demo"},
    "export": {"errors", "config", "transform", "checkpoint"},
    "conjformer": {"errors", "folders", "arguments", "transform"},
    "plan": {"errors", "arguments", "config"},
    "evaluation": {
        "errors",
        "folders",
        "arguments",
        "config",
        "transform",
        "objectives",
        "metrics",
        "data",
        "conjformer",
    },
    "client": {"errors", "arguments", "transform", "metrics"},
    "serving": {"errors", "arguments", "client"},
    "titan": CLIENT - {"demo"} | {"cluster"},
    "train": {"errors", "folders", "config", "cluster", "titan"},
    "doctor": {"errors", "folders", "arguments", "checkpoint", "cluster", "config", "plan", "transform"},
    "config_registry": {"errors", "config", "train", "titan"},
    "cli": CLIENT | {"arguments"} | {"train", "evaluation", "titan", "plan", "doctor", "client", "serving"},
}
HEAVY = {"torchtitan", "spmd_types", "tyro"}


def sources():
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def area(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Absolute names of all modules that a file imports anywhere."""
    package = ["sgt_titan", *path.relative_to(PACKAGE).parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *filter(None, [node.module])])
            found |= {f"{stem}.{alias.name}" for alias in node.names} if stem == "sgt_titan" else {stem}
    return found


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    here = area(path)
    targets = {name.split(".")[1] for name in imported(path) if name.startswith("sgt_titan.")} - {here, "__version__"}
    assert targets <= MAY_IMPORT[here], f"{here} may not import {sorted(targets - MAY_IMPORT[here])}"


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_torchtitan_is_known_in_one_folder(path):
    if area(path) != "titan":
        assert not {name.split(".")[0] for name in imported(path)} & HEAVY


def test_every_area_is_in_the_table():
    assert {area(path) for path in sources()} <= set(MAY_IMPORT)
