"""The README's first example runs as printed, and prints what it says."""

import re
from statistics import fmean

from recipes.report_runs import read_run
from smear_peft.cards.runs import shown

from .pages import ROOT, prints_what_it_says

README = (ROOT / "README.md").read_text()
PACS = {
    "linear_probe": "linear probe",
    "single": "equal width",
    "single_1x_parameters": "equal parameters",
    "smear_trained_uniform": "in training and test",
    "smear": "SMEAR, 4 experts",
}


def test_first_example_prints_what_the_readme_says():
    prints_what_it_says(README)


def test_the_pacs_table_is_that_of_the_runs():
    """Accuracies in percent over three seeds, and the numbers in the sentences around them."""
    runs = {row: [read_run(ROOT / "results" / "pacs_readme" / f"{row}-seed{i}") for i in range(3)] for row in PACS}
    told = README.split("## Does routing pay?")[1].split("\n## ")[0]
    lines = [line.strip("| ").split(" | ") for line in told.splitlines() if line.startswith("|")][2:]
    evenly = "the same adapters, merged evenly in the test"
    for name, *cells in lines:
        row = "smear" if name == evenly else next(row for row, words in PACS.items() if words in name)
        scores = [run.uniform if name == evenly else run.scores for run in runs[row]]
        assert cells[:6] == [shown([one[column] for one in scores]) for column in scores[0]]
    lost = fmean(run.scores["micro"] - run.uniform["micro"] for run in runs["smear"])
    assert f"merged\nevenly in the test it loses {lost:.1f} points" in told
    assert f"{runs['smear'][0].metrics['images']['train']:,} images" in told


def test_config_table_shows_the_real_defaults():
    from smear_peft import SmearConfig

    config = SmearConfig()
    rows = re.findall(r"^\| (`[^|]+`) \| ([^|]+) \|", README.split("## What you can set")[1], re.M)
    shown = [(name, default) for names, default in rows for name in re.findall(r"`(\w+)`", names)]
    assert len(shown) >= 15
    for name, default in shown:
        value = getattr(config, name)
        assert default == ("none" if value is None else f'`"{value}"`' if isinstance(value, str) else str(value)), name
