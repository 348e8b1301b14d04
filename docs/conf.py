"""Sphinx's configuration; ``make docs`` builds with it. Nothing is fetched while building.

What would go stale is made from the code at each build, into docs/generated: the list of public names, and the table of
the package's rooms.
"""

import ast
import inspect
import re
from pathlib import Path
from typing import Any

from sklearn.base import BaseEstimator

import sklearn_lqf

ROOT = Path(__file__).resolve().parents[1]
GENERATED = Path(__file__).resolve().parent / "generated"

project = "sklearn_lqf"
author = "sklearn_lqf developers"
version = release = sklearn_lqf.__version__
language = "en"

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.viewcode",
    "numpydoc",
    "myst_parser",
    "sphinx_gallery.gen_gallery",
]
templates_path = ["_templates"]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"sklearn_lqf {release}"
html_copy_source = False
html_show_copyright = False

smartquotes = False  # quotes of values and primes of formulas stay what they are
default_role = "literal"  # single backticks of the docstrings
autosummary_generate = True
autodoc_typehints = "none"  # numpydoc's sections state the types
numpydoc_show_class_members = False  # the template of a class lists them
myst_heading_anchors = 3  # links to headings, as in the Markdown of a repository's web page
nitpick_ignore_regex = [(r"py:.*", r"(sklearn|numpy|torch|joblib|matplotlib)\..*")]  # documented elsewhere

sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "gallery",
    "parallel": 2,
    "write_computation_times": False,
    "download_all_examples": False,
    "show_signature": False,
}


def public_names() -> dict[str, list[str]]:
    """What ``sklearn_lqf.__all__`` names, by kind."""
    kinds: dict[str, list[str]] = {"Estimators": [], "Displays": [], "Others": []}
    for name in sklearn_lqf.__all__:
        value = getattr(sklearn_lqf, name)
        estimator = inspect.isclass(value) and issubclass(value, BaseEstimator)
        kinds["Estimators" if estimator else "Displays" if name.endswith("Display") else "Others"].append(name)
    return kinds


def api_page() -> str:
    """The page of the API reference, with every public name."""
    lines = ["API reference", "=============", "", ".. currentmodule:: sklearn_lqf", ""]
    for kind, names in public_names().items():
        if names:
            lines += [kind, "-" * len(kind), "", ".. autosummary::", "   :toctree:", ""]
            lines += [*(f"   {name}" for name in names), ""]
    return "\n".join(lines)


def rooms() -> list[str]:
    """Folders of the package from the bottom to the top, as a test holds imports to it."""
    tree = ast.parse((ROOT / "tests" / "project" / "test_architecture.py").read_text(encoding="utf-8"))
    found = [n.value for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "ROOMS"]
    return ast.literal_eval(found[0])


def room_table() -> str:
    """Modules by room from the top to the bottom, each with what its docstring says first, in Markdown."""
    rows = ["| module | what it is |", "| --- | --- |"]
    for room in reversed(rooms()):
        for path in sorted((ROOT / "sklearn_lqf" / room).glob("[!_]*.py")):
            doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
            summary = doc.partition("\n\n")[0].replace("\n", " ").replace("|", "\\|").replace("``", "`")
            rows.append(f"| [`{room}/{path.name}`](../sklearn_lqf/{room}/{path.name}) | {summary} |")
    return "\n".join(rows) + "\n"


def _write(name: str, text: str) -> None:
    """Write a generated file, unless it is there with the same text: Sphinx reads again what has a new date."""
    GENERATED.mkdir(exist_ok=True)
    path = GENERATED / name
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def _remove_stale() -> None:
    """Pages of former builds, of examples and public names that are gone: they are in no table of contents."""
    names = {"api", "rooms", *(f"sklearn_lqf.{name}" for name in sklearn_lqf.__all__)}
    examples = {path.stem for path in (ROOT / "examples").glob("*.py")} | {"index"}
    for folder, current in ((GENERATED, names), (GENERATED.parent / "gallery", examples)):
        for path in folder.glob("*.rst"):
            if path.stem not in current:
                path.unlink()


def _generate(*_: Any) -> None:
    _remove_stale()
    _write("api.rst", api_page())
    _write("rooms.txt", room_table())


def _skip_foreign(app: Any, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """Members that scikit-learn adds to an estimator are documented there."""
    member = obj.fget if isinstance(obj, property) else obj
    module = getattr(member, "__module__", None) or ""
    return True if what == "class" and callable(member) and not module.startswith("sklearn_lqf") else None


def _quote_fitted(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Names of fitted attributes in the types of parameters, as in ``x : ndarray of shape (n_features_in_,)``.

    Their last underscore makes a reference of reStructuredText.
    """
    for i, line in enumerate(lines):
        if re.match(r"\w+ : ", line):
            name, _, kind = line.partition(" : ")
            lines[i] = f"{name} : " + re.sub(r"(?<!`)\b([a-z]\w*_)(?![\w`])", r"``\1``", kind)


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", _quote_fitted, priority=0)  # before numpydoc
    app.connect("config-inited", _generate)
    app.connect("autodoc-skip-member", _skip_foreign)
