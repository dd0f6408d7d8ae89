"""`make test-oldest` installs what pyproject.toml admits, no more and no less."""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


def test_the_oldest_versions_that_are_tested_are_the_lower_bounds():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    admitted = [*project["dependencies"], *project["optional-dependencies"]["vision"]]
    lines = (ROOT / "tests" / "oldest.txt").read_text().splitlines()
    tested = [line.replace("==", ">=") for line in lines if not line.startswith("#")]
    assert sorted(map(str, map(Requirement, tested))) == sorted(map(str, map(Requirement, admitted)))
