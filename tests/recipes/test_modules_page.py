"""docs/modules.md tells what the runs in results/pacs_modules say."""

from statistics import fmean

import pytest

from recipes import modules_report
from recipes.run_folder import read_json
from tests.recipes.small import ROOT

RESULTS = ROOT / "results" / "pacs_modules"
SECTION = (ROOT / "docs" / "modules.md").read_text().partition("\n## On real images\n")[2].partition("\n## ")[0]
WORDS = " ".join(SECTION.split())


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
    assert "](../results/pacs_modules/modules.png)" in SECTION
    assert (RESULTS / "modules.png").read_bytes().startswith(b"\x89PNG")


def test_the_findings_are_those_of_the_kept_runs():
    scores = modules_report.Runs.read([str(RESULTS)]).scores()

    def of(row: str, column: str = "micro") -> float:
        return fmean(one[column] for one in scores[row].values())

    def points(row: str, other: str) -> str:
        return f"{abs(of(row) - of(other)):.1f}"

    pool, wide, grown = "pool, router trained", "one plain adapter, 4 x wider", "sketch added, router trained on"
    own, sketches, pairs = domains_found()
    told = [
        f"by tag are {points('pool, by tag', 'SMEAR')} points below SMEAR",
        f"they are {points(pool, 'SMEAR')} below",
        f"keep {of('smear, uniform merge'):.1f} of {of('SMEAR'):.1f}",
        f"Of {pairs} pairs of a site",
        f"{own} have the domain's own expert as the likeliest on average, for sketches all {sketches}",
        f"the pool is {points(pool, 'pool, by tag')} points below",
        f"as well as SMEAR** (-{points('one plain adapter', 'SMEAR')})",
        f"no worse (+{points(wide, 'SMEAR')}, p = {p_of(wide):.2f})",
        f"bring sketches from {of('sketch added', 'sketch'):.0f} to {of(grown, 'sketch'):.0f}",
        f"(+{points(grown, pool)}, p = {p_of(grown):.2f})",
        f"loses {points('smear, mean routes', 'SMEAR')} points of SMEAR's",
        f"the uniform merge {points('smear, uniform merge', 'SMEAR')},",
        f"{points('pool, mean routes', pool)} and {points('pool, uniform merge', pool)} of the pool's",
        f"as one has {of('one plain adapter'):.1f}, SMEAR made into one {of('smear, mean routes'):.1f}",
        f"lose {points('smear, 4 groups of routes', 'SMEAR')}, and of the pool",
        f"nothing (+{points('pool, 4 groups of routes', pool)})",
        f"{read_json(RESULTS / 'modules-seed0' / 'metrics.json')['images']['test']:,} test images",
    ]
    assert [phrase for phrase in told if phrase not in WORDS] == []


def p_of(row: str) -> float:
    lines = [
        line.strip("| ").split(" | ") for line in table((RESULTS / "README.md").read_text(), "Differences in micro")
    ]
    return next(float(p) for name, _, _, _, p, _ in lines if name == row)


def domains_found() -> tuple[int, int, int]:
    """Pairs of a site and a domain whose likeliest expert is the domain's own: all, and sketch's; and all pairs."""
    routes = [read_json(file) for file in sorted(RESULTS.glob("*/routing.json"))]
    found = [
        (domain, max(range(len(domains)), key=weights.__getitem__) == place)
        for run in routes
        for domains in run.values()
        for place, (domain, weights) in enumerate(domains.items())
    ]
    return sum(own for _, own in found), sum(own for domain, own in found if domain == "sketch"), len(found)
