"""The reader of a modules sweep: means and tests by hand, its picture, what is kept, and runs that do not belong."""

import csv

import pytest
from scipy.stats import ttest_rel

from recipes.figures import Line, rows_as_points
from recipes.modules_report import main
from recipes.report_tables import holm
from recipes.run_folder import write_json, write_yaml
from tests.recipes.test_report import cells

# row -> group, against, right answers of ten on photo and on sketch, by seed
TABLE = {
    "head alone": ("head", None, [(5, 1), (5, 2), (5, 3)]),
    "pool, router trained": ("pooled", None, [(8, 5), (7, 6), (8, 6)]),
    "sketch added": ("added later", "pool, router trained", [(6, 6), (7, 5), (7, 4)]),
    "SMEAR": ("from scratch", None, [(9, 5), (8, 6), (9, 7)]),
    "pool, mean routes": ("collapsed", "pool, router trained", [(8, 4), (7, 4), (8, 4)]),
}


def write_runs(folder, **changes):
    for seed in range(3):
        rows = {}
        for name, (group, against, right) in TABLE.items():
            photo, sketch = right[seed]
            mean = (photo + sketch) / 20
            row = {"domains": {"photo": photo / 10, "sketch": sketch / 10}, "micro": mean, "macro": mean}
            row |= {"group": group, "updates": 75} | ({"against": against} if against else {})
            rows[name] = row | ({"spread": 0.1 + 0.1 * seed} if group == "collapsed" else {})
        place = folder / f"modules-seed{seed}"
        write_json(place / "metrics.json", {"rows": rows})
        write_yaml(place / "config.yaml", {"seed": seed, "steps": 300, **changes})
        for name in ("routing.json", "routing_smear.json"):
            write_json(place / name, {})
    return folder


def test_means_and_tests_over_seeds(tmp_path, capsys):
    out, keep = tmp_path / "out", tmp_path / "keep"
    main([str(write_runs(tmp_path / "runs")), "--out", str(out), "--keep", str(keep)])
    text = capsys.readouterr().out
    assert cells(text, "Scores", "SMEAR") == [
        "SMEAR", "from scratch", "75", "86.7 ± 5.8", "60.0 ± 10.0", "73.3 ± 5.8", "73.3 ± 5.8", "–"
    ]  # fmt: skip
    assert cells(text, "Scores", "pool, mean routes")[-1] == "20.0 ± 10.0"
    smear, pool, added, plain = [70, 70, 80], [65, 65, 70], [60, 60, 55], [60, 55, 60]
    p = {"pool": ttest_rel(pool, smear).pvalue, "added": ttest_rel(added, pool).pvalue,
         "plain": ttest_rel(plain, pool).pvalue}  # fmt: skip
    both = {name: [f"{value:.3f}", f"{holm(p)[name]:.3f}"] for name, value in p.items()}
    found = {row: cells(text, "Differences in micro", row)[1:] for row in list(TABLE)[1:] if row != "SMEAR"}
    assert found == {
        "pool, router trained": ["SMEAR", "-6.7", "3", *both["pool"]],
        "sketch added": ["pool, router trained", "-8.3", "3", *both["added"]],
        "pool, mean routes": ["pool, router trained", "-8.3", "3", *both["plain"]],
    }
    assert "head alone |" not in text.partition("## Differences")[2]
    with (out / "scores.csv").open() as file:
        rows = {(row["row"], row["column"]): float(row["mean"]) for row in csv.DictReader(file)}
    assert rows["head alone", "sketch"] == 20
    assert {f.name for f in keep.iterdir()} == {f.name for f in out.iterdir()} | {f"modules-seed{n}" for n in range(3)}
    kept = {"metrics.json", "config.yaml", "routing.json", "routing_smear.json"}
    assert {f.name for f in (keep / "modules-seed1").iterdir()} == kept
    kept = (keep / "README.md").read_text()
    main([str(keep), "--out", str(out)])  # what is kept says the same
    assert (out / "README.md").read_text() == kept


def test_the_picture_has_every_seed_and_a_line_at_the_reference(tmp_path):
    lines = [Line("a", "one", {"x": [1, 2, 6]}), Line("b", "one", {"x": [4, 5]}), Line("c", "two", {"x": [7]})]
    panel = rows_as_points(lines, {"x": "percent"}, "a", tmp_path / "rows.png").axes[0]
    drawn = [sorted(line.get_xdata()) for line in panel.lines]
    for points in ([1, 2, 6], [3], [4, 5], [4.5], [7], [3, 3]):
        assert points in drawn
    assert [label.get_text() for label in panel.get_yticklabels()] == ["a", "b", "c"]
    assert (tmp_path / "rows.png").read_bytes().startswith(b"\x89PNG")


def test_runs_that_are_no_seeds_of_one_job_are_refused(tmp_path):
    runs, others = write_runs(tmp_path / "runs"), write_runs(tmp_path / "others")
    with pytest.raises(ValueError, match=r"has a seed twice: .*runs/modules-seed0, .*others/modules-seed0"):
        main([str(runs), str(others)])
    longer = write_runs(tmp_path / "longer", steps=600) / "modules-seed1"
    with pytest.raises(ValueError, match="differ in steps"):
        main([str(runs / "modules-seed0"), str(longer)])
    with pytest.raises(FileNotFoundError, match="no run folder"):
        main([str(tmp_path / "nowhere")])
