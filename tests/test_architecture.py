"""The shape of the package: imports go one way, and committed files name no machine."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "sklearn_lqf"

# From the bottom to the top. A module imports only from rows above its own.
LAYERS = [
    {"threads", "depthwise", "sketch", "solvers", "prior", "ridge"},
    {"images", "offline", "progress", "preprocessing", "header", "reference"},
    {"activations", "surgery", "cut", "cache", "distributed", "readout", "kfac"},
    {"weights", "versions", "stages", "reader"},
    {"backbones", "archive"},
    {"tangents"},
    {"graph"},
    {"linearize"},
    {"features", "prepared", "objective"},
    {"problem"},
    {"model", "paper", "answers", "parameters"},
    {"persistence", "serving", "inputs"},
    {"base"},
    {"classifier", "regressor"},
    {"selection"},
    {"curves"},
    {"plotting"},
    {"__init__", "__main__"},
]
# Linear algebra: these import no other module of the package and no library of images, networks or estimators.
PURE = {"depthwise", "kfac", "prior", "ridge", "sketch", "solvers"}
PURE_LIBRARIES = {"numpy", "scipy", "torch"}

MODULES = sorted(path.stem for path in PACKAGE.rglob("*.py"))

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


def _imports(tree: ast.AST) -> set[str]:
    """Absolute dotted names that are imported, wherever in the module the import stands."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, ["sklearn_lqf" if node.level else "", node.module]))
            names.update(f"{base}.{alias.name}" for alias in node.names)
    return names


def _imported_modules(tree: ast.AST) -> set[str]:
    """Modules of the package that are imported; "__init__" for the package itself and its own names."""
    paths = [name.split(".") for name in _imports(tree)]
    own = [path[1] if len(path) > 1 else "" for path in paths if path[0] == "sklearn_lqf"]
    return {name if name in MODULES else "__init__" for name in own}


def _level(module: str) -> int:
    for level, layer in enumerate(LAYERS):
        if module in layer:
            return level
    raise AssertionError(
        f"sklearn_lqf/{module}.py has no place in the architecture: put it into a row of LAYERS in "
        f"{Path(__file__).name}, above all rows that it imports."
    )


def _tree(module: str) -> ast.Module:
    return ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))


def _text_files() -> list[Path]:
    folders = [path for name in SCANNED for path in (ROOT / name).rglob("*") if path.is_file()]
    files = [ROOT / name for name in SCANNED_FILES if (ROOT / name).exists()]
    return sorted(p for p in [*folders, *files] if NOT_OURS.isdisjoint(p.parts) and b"\0" not in p.read_bytes())


def test_package_is_flat():
    nested = [str(path.relative_to(ROOT)) for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE]
    assert not nested


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way(module):
    level = _level(module)
    wrong = {other for other in _imported_modules(_tree(module)) if _level(other) >= level}
    assert not wrong, f"{module} may import only from the layers below its own, not {sorted(wrong)}"


@pytest.mark.parametrize("module", sorted(PURE))
def test_linear_algebra_knows_no_network_and_no_data(module):
    tree = _tree(module)
    assert _imported_modules(tree) <= PURE
    imported = {name.partition(".")[0] for name in _imports(tree)} - {"sklearn_lqf"}
    assert imported <= PURE_LIBRARIES | set(sys.stdlib_module_names)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from .graph import Split", {"graph"}),
        ("from . import graph, kfac", {"graph", "kfac"}),
        ("from sklearn_lqf.graph import Split", {"graph"}),
        ("from sklearn_lqf import LQFClassifier", {"__init__"}),
        ("from . import __version__", {"__init__"}),
        ("import sklearn_lqf", {"__init__"}),
        ("import sklearn_lqf.graph as g", {"graph"}),
        ("def f():\n    from .graph import Split", {"graph"}),
        ("import sklearn\nfrom torch import nn", set()),
    ],
)
def test_every_form_of_import_is_seen(source, expected):
    assert _imported_modules(ast.parse(source)) == expected


@pytest.mark.parametrize("module", [m for m in MODULES if m != "distributed"])
def test_one_module_knows_torch_distributed(module):
    assert not [name for name in _imports(_tree(module)) if name.startswith("torch.distributed")]
    used = {ast.unparse(node) for node in ast.walk(_tree(module)) if isinstance(node, ast.Attribute)}
    assert not [name for name in used if name.startswith("torch.distributed")]


def test_unplaced_module_is_reported():
    with pytest.raises(AssertionError, match="put it into a row of LAYERS"):
        _level("novelty")


def test_no_module_is_named_utils():
    assert not [module for module in MODULES if module.strip("_") in {"utils", "util", "helpers", "misc"}]


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
