"""The shape of the package: imports go one way, and committed files name no machine."""

import ast
import functools
import re
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "sklearn_lqf"

# From the bottom to the top. The modules of a room import from their own room and from those before it.
ROOMS = ["runtime", "images", "backbones", "network", "engine", "paper", "answers", "io", "estimators", "displays"]
# Linear algebra: these import no other module of the package and no library of images, networks or estimators.
PURE = {
    "engine.centered", "engine.conjugate_gradients", "engine.estimate", "engine.preconditioner", "engine.prior",
    "engine.ridge", "engine.sketch", "network.depthwise", "paper.kfac", "paper.solvers", "runtime.memory",
    "runtime.processes",
}  # fmt: skip
PURE_LIBRARIES = {"numpy", "scipy", "torch"}

# Written so that they do not match themselves.
FORBIDDEN = {
    "a path of one machine": re.compile(r"(?<![\w.~}-])/(?:work|home|root|Users|opt|mnt)/"),
    "the address of a package registry": re.compile(
        r"pypi\.org|pythonhosted\.org|download\.pytorch\.org/whl|conda\.anaconda\.org"
        r"|--(?:(?:extra-)?index-url|find-links)"
    ),
}
SCANNED = ["sklearn_lqf", "tests", "examples", "docs", "benchmarks", ".ci"]
NOT_OURS = {"__pycache__", "_build", "gallery", "generated"}  # made by Python and by make docs
SCANNED_FILES = [
    "pyproject.toml", "Makefile", "constraints.txt", "constraints-oldest.txt", "README.md", "CHANGELOG.md",
    ".gitignore",
]  # fmt: skip


MODULES = sorted(".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in PACKAGE.rglob("*.py"))
IN_ROOMS = [module for module in MODULES if "." in module]


def _room(module: str) -> str | None:
    """The room of a module; None for those beside the rooms."""
    room, dot, _ = module.partition(".")
    return room if dot else None


@functools.cache
def _tree(module: str) -> ast.Module:
    return ast.parse(PACKAGE.joinpath(*module.split(".")).with_suffix(".py").read_text(encoding="utf-8"))


def _imports(module: str, nodes: list[ast.AST] | None = None) -> set[str]:
    """Absolute dotted names that a module imports, wherever in it the import stands, or of some of its nodes."""
    names = set()
    for node in ast.walk(_tree(module)) if nodes is None else nodes:
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            here = ["sklearn_lqf", *module.split(".")][: -node.level] if node.level else []
            base = ".".join(filter(None, [*here, node.module]))
            names.update(f"{base}.{alias.name}" for alias in node.names)
    return names


def _imported_modules(module: str) -> set[str]:
    """Modules of the package that are imported; "__init__" for the package itself and its own names."""
    found = set()
    for name in _imports(module):
        first, *path = name.split(".")
        if first == "sklearn_lqf":
            near = [".".join(path[:k]) for k in (2, 1) if ".".join(path[:k]) in MODULES]
            found.add(near[0] if near else "__init__")
    return found - {module}


def test_rooms_are_known():
    rooms = {_room(module) for module in IN_ROOMS}
    assert rooms == set(ROOMS), "each folder of the package has a place in ROOMS, above all rooms it imports"


@pytest.mark.parametrize("module", IN_ROOMS)
def test_imports_go_one_way_and_take_no_private_name(module):
    below = ROOMS[: ROOMS.index(_room(module)) + 1]
    wrong = {other for other in _imported_modules(module) if _room(other) not in below}
    assert wrong <= {"versions"}, f"{module} may import from {below}, not {sorted(wrong)}"
    names = [name.rpartition(".")[2] for name in _imports(module) if name.startswith("sklearn_lqf.")]
    assert not [name for name in names if re.match("_[^_]", name)]


def test_modules_of_a_room_import_in_one_order():
    assert list(TopologicalSorter({m: _imported_modules(m) for m in IN_ROOMS}).static_order())  # a cycle raises


@pytest.mark.parametrize("module", sorted(PURE))
def test_linear_algebra_knows_no_network_and_no_data(module):
    assert _imported_modules(module) <= PURE
    imported = {name.partition(".")[0] for name in _imports(module)} - {"sklearn_lqf"}
    assert imported <= PURE_LIBRARIES | set(sys.stdlib_module_names)


@pytest.mark.parametrize("module", [m for m in MODULES if m != "runtime.processes"])
def test_one_module_knows_torch_distributed(module):
    used = {ast.unparse(node) for node in ast.walk(_tree(module)) if isinstance(node, ast.Attribute)}
    assert not [name for name in used | _imports(module) if name.startswith("torch.distributed")]


@pytest.mark.parametrize("module", MODULES)
def test_matplotlib_is_imported_inside_functions(module):
    nodes = list(ast.walk(_tree(module)))
    inside = {node for f in nodes if isinstance(f, ast.FunctionDef) for node in ast.walk(f)}
    at_import = _imports(module, [node for node in nodes if node not in inside])
    assert not [name for name in at_import if name.partition(".")[0] == "matplotlib"]


@pytest.mark.parametrize("what", FORBIDDEN)
def test_files_name_no_machine_and_no_registry(what):
    folders = [path for name in SCANNED for path in (ROOT / name).rglob("*") if path.is_file()]
    files = [ROOT / name for name in SCANNED_FILES if (ROOT / name).exists()]
    found = []
    for path in {*folders, *files}:
        if NOT_OURS.isdisjoint(path.parts) and b"\0" not in path.read_bytes():
            lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
            found += [f"{path.relative_to(ROOT)}: {line[:100]}" for line in lines if FORBIDDEN[what].search(line)]
    assert not found, f"files that name {what}:\n" + "\n".join(found)
