"""`make test-oldest` installs what pyproject.toml admits, no more and no less."""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


def bounds(requirement: Requirement) -> list[str]:
    """What it says but for single releases that it leaves out."""
    return [str(bound) for bound in requirement.specifier if bound.operator != "!="]


def test_the_oldest_versions_that_are_tested_are_the_lower_bounds():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    admitted = [*project["dependencies"], *project["optional-dependencies"]["vision"]]
    lines = (ROOT / "tests" / "oldest.txt").read_text().splitlines()
    tested = [line.replace("==", ">=") for line in lines if not line.startswith("#")]
    lowest = [f"{found.name}{bound}" for found in map(Requirement, admitted) for bound in bounds(found)]
    assert sorted(map(str, map(Requirement, tested))) == sorted(lowest)
