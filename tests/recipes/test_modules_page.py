"""docs/modules.md tells what the runs in results/pacs_modules say."""

import pytest

from recipes import modules_report
from tests.recipes.small import ROOT

RESULTS = ROOT / "results" / "pacs_modules"
SECTION = (ROOT / "docs" / "modules.md").read_text().partition("\n## On real images\n")[2].partition("\n## ")[0]


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> str:
    """The report of the kept runs, drawn again."""
    folder = tmp_path_factory.mktemp("report")
    modules_report.main([str(RESULTS), "--out", str(folder / "out")])
    return (folder / "out" / "README.md").read_text()


def table(text: str, title: str) -> list[str]:
    return [line for line in text.partition(f"## {title}\n")[2].partition("\n## ")[0].splitlines() if line[:1] == "|"]


def test_the_tables_are_those_of_the_kept_runs(report):
    assert (RESULTS / "README.md").read_text() == report
    for title in ("Scores", "Differences in micro"):
        lines = table(report, title)
        assert len(lines) > 10
        assert "\n".join(lines) in SECTION


def test_the_picture_is_the_reports():
    assert "](images/modules.png)" in SECTION
    assert (ROOT / "docs/images/modules.png").read_bytes() == (RESULTS / "modules.png").read_bytes()
