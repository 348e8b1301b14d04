"""The shape of the package: imports go one way, and committed files name no machine."""

import ast
import re
import sys
from collections import Counter
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
}  # fmt: skip
PURE_LIBRARIES = {"numpy", "scipy", "torch"}
LARGEST_ROOM = 12

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


def _room(module: str) -> str | None:
    """The room of a module; None for those beside the rooms."""
    room, dot, _ = module.partition(".")
    return room if dot else None


def _path(module: str) -> Path:
    return PACKAGE.joinpath(*module.split(".")).with_suffix(".py")


def _tree(module: str) -> ast.Module:
    return ast.parse(_path(module).read_text(encoding="utf-8"))


def _imports(tree: ast.AST, room: str | None = None) -> set[str]:
    """Absolute dotted names that a module of a room imports, wherever in it the import stands."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            here = ["sklearn_lqf", room or ""][: 2 - (node.level - 1 if room else 0)] if node.level else []
            base = ".".join(filter(None, [*here, node.module]))
            names.update(f"{base}.{alias.name}" for alias in node.names)
    return names


def _imported_modules(tree: ast.AST, room: str | None = None) -> set[str]:
    """Modules of the package that are imported; "__init__" for the package itself and its own names."""
    found = set()
    for name in _imports(tree, room):
        first, *path = name.split(".")
        if first == "sklearn_lqf":
            near = [".".join(path[:k]) for k in (2, 1) if ".".join(path[:k]) in MODULES]
            found.add(near[0] if near else "__init__")
    return found


def _text_files() -> list[Path]:
    folders = [path for name in SCANNED for path in (ROOT / name).rglob("*") if path.is_file()]
    files = [ROOT / name for name in SCANNED_FILES if (ROOT / name).exists()]
    return sorted(p for p in [*folders, *files] if NOT_OURS.isdisjoint(p.parts) and b"\0" not in p.read_bytes())


def test_rooms_are_known_and_of_a_size_to_look_through():
    counts = Counter(room for m in MODULES if (room := _room(m)) and not m.endswith("__init__"))
    assert set(counts) == set(ROOMS), "each folder of the package has a place in ROOMS, above all rooms it imports"
    assert all(1 < count <= LARGEST_ROOM for count in counts.values()), counts


@pytest.mark.parametrize("module", [m for m in MODULES if _room(m)])
def test_imports_go_one_way(module):
    room = _room(module)
    below = ROOMS[: ROOMS.index(room) + 1]
    wrong = {other for other in _imported_modules(_tree(module), room) if _room(other) not in below}
    assert wrong <= {"versions"}, f"{module} may import from {below}, not {sorted(wrong)}"


def test_modules_of_a_room_import_in_one_order():
    edges = {m: {o for o in _imported_modules(_tree(m), _room(m)) if o != m} for m in MODULES if _room(m)}
    assert list(TopologicalSorter(edges).static_order())  # a cycle raises


@pytest.mark.parametrize("module", [m for m in MODULES if _room(m)])
def test_no_private_name_is_imported(module):
    private = [name for name in _imports(_tree(module), _room(module)) if name.startswith("sklearn_lqf.")]
    assert not [name for name in private if re.match("_[^_]", name.rpartition(".")[2])]


@pytest.mark.parametrize("module", sorted(PURE))
def test_linear_algebra_knows_no_network_and_no_data(module):
    tree = _tree(module)
    assert _imported_modules(tree, _room(module)) <= PURE
    imported = {name.partition(".")[0] for name in _imports(tree, _room(module))} - {"sklearn_lqf"}
    assert imported <= PURE_LIBRARIES | set(sys.stdlib_module_names)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from .tracing import Split", {"network.tracing"}),
        ("from . import tracing, cut", {"network.tracing", "network.cut"}),
        ("from ..images.cache import Fingerprint", {"images.cache"}),
        ("from ..images import cache", {"images.cache"}),
        ("from sklearn_lqf.network.tracing import Split", {"network.tracing"}),
        ("from sklearn_lqf import LQFClassifier", {"__init__"}),
        ("from .. import __version__", {"__init__"}),
        ("from ..versions import __version__", {"versions"}),
        ("import sklearn_lqf", {"__init__"}),
        ("import sklearn_lqf.network.tracing as g", {"network.tracing"}),
        ("def f():\n    from .tracing import Split", {"network.tracing"}),
        ("import sklearn\nfrom torch import nn", set()),
    ],
)
def test_every_form_of_import_is_seen(source, expected):
    assert _imported_modules(ast.parse(source), "network") == expected


@pytest.mark.parametrize("module", [m for m in MODULES if m != "runtime.processes"])
def test_one_module_knows_torch_distributed(module):
    assert not [name for name in _imports(_tree(module)) if name.startswith("torch.distributed")]
    used = {ast.unparse(node) for node in ast.walk(_tree(module)) if isinstance(node, ast.Attribute)}
    assert not [name for name in used if name.startswith("torch.distributed")]


def test_no_module_is_named_utils():
    assert not [
        module for module in MODULES if module.rpartition(".")[2].strip("_") in {"utils", "util", "helpers", "misc"}
    ]


@pytest.mark.parametrize("module", MODULES)
def test_matplotlib_is_imported_inside_functions(module):
    # Only what runs at import counts: function bodies are cut off.
    tree = _tree(module)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = []
    assert not [name for name in _imports(tree) if name.partition(".")[0] == "matplotlib"]


@pytest.mark.parametrize("what", FORBIDDEN)
def test_files_name_no_machine_and_no_registry(what):
    files = _text_files()
    assert Path(__file__).resolve() in files
    found = []
    for path in files:
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            if FORBIDDEN[what].search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not found, f"files that name {what}:\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("what", "parts"),
    [
        ("a path of one machine", ('open("', "work", 'x.png")')),
        ("a path of one machine", ("file://", "home", "me")),
        ("the address of a package registry", ("see pypi.", "org", "simple")),
        ("the address of a package registry", ("pip -", "-index-url", "simple")),
    ],
)
def test_forbidden_text_is_found(what, parts):
    separator = "/" if what == "a path of one machine" else ""
    assert FORBIDDEN[what].search(separator.join(parts))
