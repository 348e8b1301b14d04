"""pyproject.toml and the two files of constraints say the same of the versions."""

import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[2]
EXTRAS = ["hf", "plot", "progress", "save"]  # of those who use the package, and are tested
FEWEST = 5  # bounds: fewer would mean that they are no longer found

pytestmark = pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib")


def _pins(file: str) -> dict[str, Version]:
    lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
    found = (re.match(r"([\w.-]+)==([\w.]+)", line) for line in lines)
    return {canonicalize_name(match[1]): Version(match[2]) for match in found if match}


def _bounds(*groups: list[str]) -> dict[str, Version]:
    requirements = [Requirement(text) for group in groups for text in group]
    return {canonicalize_name(r.name): Version(s.version) for r in requirements for s in r.specifier}


@pytest.fixture
def project():
    import tomllib

    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def test_each_lower_bound_is_the_version_that_is_tested(project):
    extras = project["optional-dependencies"]
    bounds = _bounds(project["dependencies"], *(extras[name] for name in EXTRAS), extras["test"])
    assert len(bounds) >= FEWEST
    pins = _pins("constraints-oldest.txt")
    assert {name: pins.get(name) for name in bounds} == bounds


def test_each_dependency_has_a_lower_bound_and_the_oldest_are_not_above_those_that_are_developed_with(project):
    assert all(Requirement(text).specifier for text in project["dependencies"])
    current, oldest = _pins("constraints.txt"), _pins("constraints-oldest.txt")
    assert not {k: v for k, v in oldest.items() if k in current and v > current[k]}
