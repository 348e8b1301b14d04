"""The pages do what they say: their Python runs, their names and links exist, the site leaves nothing out."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest

import sklearn_lqf

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
SLOW = {"README.md", "docs/guide.md"}  # more than ten seconds on one thread
BLOCKS_MIN = 12  # of Python in all pages, that run: fewer would mean that they are no longer found

_FENCE = re.compile(r"^(?P<fence>`{3,})(?P<info>[^`\n]*)\n(?P<body>.*?)^(?P=fence) *$", re.M | re.S)
_NOT_RUN = re.compile(r"<!-- not run: \S.*? -->\s*\Z", re.S)
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


def _name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def _blocks(page: Path) -> list[tuple[int, str]]:
    """Line and source of each Python block that is to run."""
    text = page.read_text(encoding="utf-8")
    return [
        (text.count("\n", 0, match.start("body")), match["body"])
        for match in _FENCE.finditer(text)
        if match["info"].strip() == "python" and not _NOT_RUN.search(text[: match.start()])
    ]


def _anchors(page: Path) -> list[str]:
    """The fragments by which the web page of a repository, and MyST, know the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return [re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings]


_RUNNING = [page for page in PAGES if _blocks(page)]


@pytest.mark.parametrize(
    "page", [pytest.param(p, id=_name(p), marks=[pytest.mark.slow] * (_name(p) in SLOW)) for p in _RUNNING]
)
def test_python_of_the_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for line, source in _blocks(page):
        code = compile("\n" * line + source, _name(page), "exec")  # errors show the line of the page
        exec(code, namespace)


def test_pages_have_python():
    # The list above is made when this file is collected: an empty one would pass unseen.
    assert sum(len(_blocks(page)) for page in PAGES) >= BLOCKS_MIN
    assert {_name(page) for page in _RUNNING} >= SLOW


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_blocks_are_closed_and_named_and_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    prose = _FENCE.sub("", text)
    assert "```" not in prose
    assert not [m for m in _FENCE.finditer(text) if not m["info"].strip()], "name the language of each block"
    broken = []
    for target in _LINK.findall(re.sub(r"`[^`\n]+`", "``", prose)):
        name, _, fragment = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        if re.match(r"[a-z]+:", target) or name == "generated/api":  # elsewhere, and made by make docs
            continue
        if not path.exists() or (fragment and fragment not in _anchors(path)):
            broken.append(target)
    assert not broken


def test_every_page_is_in_a_table_of_contents():
    trees = re.findall(r"^```\{toctree\}\n(.*?)^```", (DOCS / "index.md").read_text(encoding="utf-8"), re.M | re.S)
    entries = [line for tree in trees for line in tree.splitlines() if line and not line.startswith(":")]
    pages = {page.stem for page in DOCS.glob("*.md")} - {"index"}
    assert set(entries) == pages | {"gallery/index", "generated/api"}
    assert len(entries) == len(set(entries))


def test_api_page_has_every_public_name():
    spec = importlib.util.spec_from_file_location("docs_conf", DOCS / "conf.py")
    conf = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conf)
    listed = {line.strip() for line in conf.api_page().splitlines() if line.startswith("   ")}
    assert listed >= set(sklearn_lqf.__all__)


def test_functions_beside_the_formulas_exist():
    found = re.findall(r"\[`(\w+)\.([\w.]+)`\]\(\.\./sklearn_lqf/(\w+)/(\w+)\.py\)", (DOCS / "method.md").read_text())
    assert len(found) > 15
    for module, path, room, file in found:
        assert module == file
        value = importlib.import_module(f"sklearn_lqf.{room}.{module}")
        for name in path.split("."):
            value = getattr(value, name)
        assert value.__doc__, f"{module}.{path} says nothing"


@pytest.mark.parametrize("script", sorted((ROOT / "examples").glob("*.py")), ids=lambda path: path.name)
def test_examples_are_of_the_gallery(script):
    # The gallery executes what is called plot_*.py and needs a title; there is no __file__ when it does.
    assert script.name.startswith("plot_")
    text = script.read_text(encoding="utf-8")
    title, underline = (ast.get_docstring(ast.parse(text)) or "\n").splitlines()[:2]
    assert set(underline) == {"="}
    assert len(underline) >= len(title)
    assert "__file__" not in text
