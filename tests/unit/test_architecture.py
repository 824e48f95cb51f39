"""Imports point one way, and torchtitan is known in one folder."""

import ast
import re
from collections.abc import Collection
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import sgt_titan

PACKAGE = Path(sgt_titan.__file__).parent

# area -> areas it may import, lazily or not. `titan` and `evaluation` do not know each other.
MAY_IMPORT = {
    "errors": set(),
    "imports": set(),
    "arguments": {"errors"},
    "terminal": set(),
    "processes": set(),
    "disk": {"errors"},
    "trunk": {"errors"},
    "config": {"errors", "trunk", "demo"},
    "checkpoint": {"disk"},
    "cluster": {"errors", "disk", "arguments", "checkpoint", "config"},
    "transform": {"errors", "terminal", "disk", "arguments", "objectives", "trunk"},
    "private": {"errors"},
    "objectives": {"errors"},
    "metrics": set(),
    "demo": {"errors"},
    "data": {"errors", "disk", "processes", "config", "transform", "trunk", "demo", "private"},
    "export": {"errors", "disk", "config", "transform", "trunk", "checkpoint"},
    "outgoing": {"errors", "arguments"},
    "conjformer": {"errors", "terminal", "disk", "arguments", "outgoing", "config", "transform", "trunk"},
    "plan": {"errors", "arguments", "config", "trunk"},
    "evaluation": {
        "processes",
        "errors",
        "terminal",
        "disk",
        "arguments",
        "outgoing",
        "config",
        "trunk",
        "transform",
        "objectives",
        "metrics",
        "data",
        "conjformer",
        "private",
    },
    "client": {"errors", "terminal", "disk", "outgoing", "transform", "metrics", "private"},
    "serving": {"errors", "terminal", "arguments", "outgoing", "client", "private"},
    "titan": {
        "errors",
        "processes",
        "disk",
        "config",
        "trunk",
        "transform",
        "objectives",
        "metrics",
        "data",
        "checkpoint",
        "export",
        "cluster",
        "conjformer",
    },
    "train": {"errors", "imports", "disk", "config", "cluster", "titan"},
    "doctor": {"errors", "disk", "arguments", "cluster", "config", "plan", "transform"},
    "config_registry": {"errors", "config", "train", "titan"},
    "inspect_command": {"errors", "terminal", "arguments", "config", "client", "private"},
    "readings": {"errors", "terminal", "arguments", "config", "client", "private", "evaluation", "data"},
    "cli": {
        "errors",
        "arguments",
        "config",
        "data",
        "export",
        "train",
        "evaluation",
        "plan",
        "doctor",
        "inspect_command",
        "readings",
    }
    | {"serving", "conjformer", "cluster", "transform"},
}
# The same inside the largest area. `options` belongs to every command of it.
ROOMS = {
    "options": set(),
    "world": set(),
    "attacks": {"world", "options"},
    "scores": {"world", "attacks", "options"},
    "report": set(),
    "measure": {"world", "attacks", "scores", "report", "options"},
    "studies": {"attacks", "scores", "report", "measure", "options"},
}
HEAVY = {"torchtitan", "spmd_types", "tyro"}


def sources():
    return [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def area(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path, modules: Collection[str] = ()) -> set[str]:
    """Absolute names of all modules that a file imports anywhere, by a statement or by ``import_module`` of a name.

    modules: names known to be modules, so that ``from . import name`` means the module and not its package.
    """
    package = ["sgt_titan", *path.relative_to(PACKAGE).parts[:-1]]
    found, text = set(), path.read_text()
    if "import_module(" in text:
        found |= set(re.findall(r'"(sgt_titan(?:\.\w+)+)[":]', text))
    for node in ast.walk(_NoTypes().visit(ast.parse(text)) if modules else ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, *filter(None, [node.module])])
            names = {f"{stem}.{alias.name}" for alias in node.names}
            below = names if stem == "sgt_titan" else names & set(modules)
            found |= below if below == names else below | {stem}
    return found


class _NoTypes(ast.NodeTransformer):
    """Leaves out what stands under ``if TYPE_CHECKING``."""

    def visit_If(self, node: ast.If) -> ast.If | None:
        return None if isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING" else self.generic_visit(node)


def targets(path: Path) -> set[str]:
    """Other areas that a file imports."""
    names = (name for name in imported(path) if name.startswith("sgt_titan."))
    return {name.split(".")[1] for name in names} - {area(path), "__version__"}


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    here, found = area(path), targets(path)
    assert found <= MAY_IMPORT[here], f"{here} may not import {sorted(found - MAY_IMPORT[here])}"


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_torchtitan_is_known_in_one_folder(path):
    if area(path) != "titan":
        assert not {name.split(".")[0] for name in imported(path)} & HEAVY


# Where a file or folder gets its name, is waited for, or is asked for room. Beside `disk`: the token of a run's
# directory, a protocol of renames and links of its own.
OF_THE_DISK = {"replace", "rename", "link", "fsync", "fdatasync", "statvfs", "access", "disk_usage", "mkstemp", "move"}
AT_THE_DISK = {"disk.py", "cluster/ownership.py"}


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_one_door_to_the_disk(path):
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and node.attr in OF_THE_DISK:
            module = node.value.id if isinstance(node.value, ast.Name) else ""
            if node.attr == "rename" or module in ("os", "shutil", "tempfile"):
                found.add(f"{module or '...'}.{node.attr}")
    name = str(path.relative_to(PACKAGE))
    assert bool(found) == (name in AT_THE_DISK), f"{name}: {sorted(found)}: sgt_titan/disk.py is the door"


def test_the_table_says_what_is():
    """No area is left out, nothing is allowed that nobody does, and no way leads back."""
    found = {area(path): set() for path in sources()}
    for path in sources():
        found[area(path)] |= targets(path)
    assert found == MAY_IMPORT
    TopologicalSorter(MAY_IMPORT).prepare()


def test_the_rooms_of_the_evaluation():
    """The table says what is, and no way leads back."""
    home = PACKAGE / "evaluation"
    found: dict[str, set[str]] = {}
    for path in home.rglob("*.py"):
        room = path.relative_to(home).parts[0].removesuffix(".py")
        names = imported(path) | imported(path, {f"sgt_titan.evaluation.{other}" for other in ROOMS})
        names = {name.split(".")[2] for name in names if name.startswith("sgt_titan.evaluation.")}
        found.setdefault(room, set()).update(names - {room})
    assert found.pop("__init__") == set()
    assert found == ROOMS
    TopologicalSorter(ROOMS).prepare()


def test_no_circles_between_files():
    """Wherever an import stands: one that hides in a function to break a circle is a circle; types alone are none."""
    TopologicalSorter(graph()).prepare()


def graph() -> dict[str, set[str]]:
    """Module -> those it imports."""
    names = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
             for path in sources()}  # fmt: skip
    return {
        name: {target for target in imported(path, names) if target in names and target != name}
        for name, path in names.items()
    }


if __name__ == "__main__":  # PYTHONPATH=CHECKOUT python tests/unit/test_architecture.py
    arrows = graph()
    try:
        TopologicalSorter(arrows).prepare()
        circle = "no circle"
    except CycleError as error:
        circle = f"a circle of {len(set(error.args[1]))}"
    lines = sum(len(path.read_text().splitlines()) for path in sources())
    print(f"{len(arrows)} files, {lines:,} lines, {sum(map(len, arrows.values())):,} arrows, {circle}")
