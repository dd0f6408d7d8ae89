"""Reports from run folders alone: figures by hand, tests over seeds, dropout side by side, and folders that lie."""

import csv
import json
import statistics

import pytest
from scipy.stats import ttest_rel

from recipes import report
from recipes.report_tables import holm
from recipes.run_folder import read_json, write_json, write_lines, write_yaml
from recipes.t5_glue import main as t5_glue
from tests.recipes.small import command

DOMAINS = ("drawn", "seen")
ROUTES = {"layer1.0.act2": {"drawn": [0.25, 0.75], "seen": [1.0, 0.0]}}


def write_run(folder, right, uniform=None, predictions=True, **config):
    """A run with so many right answers of ten in each domain."""
    folder.mkdir(parents=True)
    rows = [
        {"name": f"{d}/{i}", "domain": d, "label": 1, "prediction": int(i < n)}
        for d, n in zip(DOMAINS, right, strict=True)
        for i in range(10)
    ]

    def scores(numbers):
        domains = {d: n / 10 for d, n in zip(DOMAINS, numbers, strict=True)}
        return {"domains": domains, "micro": sum(numbers) / 20, "macro": sum(numbers) / 20}

    metrics = {**scores(right), "trained_parameters": {"adapter": 11_600, "head": 400}}
    write_json(folder / "metrics.json", metrics | ({"uniform_routes": scores(uniform)} if uniform else {}))
    write_yaml(folder / "config.yaml", {"routing": "smear", "expert_dropout": None, "steps": 3, **config})
    write_json(folder / "routing.json", ROUTES)
    if predictions:
        write_lines(folder / "predictions.jsonl", rows)


@pytest.fixture
def runs(tmp_path):
    root = tmp_path / "runs"
    for seed, (wide, smear, even, dry) in enumerate((((5, 7), (6, 9), (5, 7), (7, 7)), ((4, 8), (7, 9), (5, 8), (4, 8)),
                                                     ((6, 7), (6, 8), (4, 8), (6, 9)))):  # fmt: skip
        write_run(root / f"1x_parameters-seed{seed}", wide, routing="single", seed=seed)
        write_run(root / f"smear-seed{seed}", smear, even, seed=seed)
        write_run(root / f"smear_no_dropout-seed{seed}", dry, seed=seed, expert_dropout=0.0)
    return root


def cells(text, table, row):
    lines = text.partition(f"## {table}")[2].partition("\n## ")[0].splitlines()
    return next(line.strip("| ").split(" | ") for line in lines if line.startswith(f"| {row} |"))


def test_scores_are_means_over_seeds(runs, tmp_path, capsys):
    report.main([str(runs), "--out", str(tmp_path / "out")])
    text = capsys.readouterr().out
    assert cells(text, "Scores", "smear") == [
        "smear",
        "63.3 ± 5.8",
        "86.7 ± 5.8",
        "75.0 ± 5.0",
        "75.0 ± 5.0",
        "3",
        "12 k",
    ]
    assert cells(text, "Scores", "smear, merged evenly in the test")[3] == "61.7 ± 2.9"
    with (tmp_path / "out" / "scores.csv").open() as file:
        rows = {(row["row"], row["column"]): row for row in csv.DictReader(file)}
    assert float(rows["smear", "micro"]["mean"]) == pytest.approx(statistics.fmean([75, 80, 70]))
    assert float(rows["smear", "drawn"]["deviation"]) == pytest.approx(statistics.stdev([60, 70, 60]), abs=1e-4)


def test_differences_are_tested_over_seeds_and_controls_against_their_own_row(runs, tmp_path, capsys):
    report.main([str(runs), "--out", str(tmp_path / "out")])
    text = capsys.readouterr().out
    found = cells(text, "Differences in micro", "smear")
    p = ttest_rel([75, 80, 70], [60, 60, 65]).pvalue
    assert found[1:5] == ["1x_parameters", "+13.3", "3", f"{p:.3f}"]
    assert cells(text, "Differences in micro", "smear, merged evenly in the test")[1:3] == ["smear", "-13.3"]


def test_holms_correction():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})
    assert holm({"a": 0.9, "b": 0.8}) == {"b": 1.0, "a": 1.0}


def test_expert_dropout_is_shown_on_and_off(runs, tmp_path, capsys):
    report.main([str(runs), "--out", str(tmp_path / "out")])
    found = cells(capsys.readouterr().out, "Expert dropout", "smear")
    p = f"{ttest_rel([75, 80, 70], [70, 60, 75]).pvalue:.3f}"
    assert found == ["smear", "68.3 ± 7.6", "75.0 ± 5.0", "+6.7", "3", p, p]


def test_smear_is_also_tested_against_even_routes(runs, tmp_path, capsys):
    for seed in range(3):
        write_run(runs / f"smear_trained_uniform-seed{seed}", (3 + seed % 2, 4), seed=seed, routes="uniform")
    report.main([str(runs), "--out", str(tmp_path / "out")])
    text = capsys.readouterr().out
    found = cells(text, "Differences in micro from smear_trained_uniform", "smear")
    p = ttest_rel([75, 80, 70], [35, 40, 35]).pvalue
    assert found[1:5] == ["smear_trained_uniform", "+38.3", "3", f"{p:.3f}"]
    assert float(found[5]) < 0.05
    told = text.partition("## Differences in micro from")[2].partition("\n|")[0]
    assert "Below 0.05 after correction: smear, " in told or told.rstrip().endswith("smear.")
    assert "Below 0.05 after correction: none." in text.partition("## Expert dropout")[2]


@pytest.mark.parametrize(
    ("seen", "words"),
    [
        ([{"images_seen": 19_200}] * 2, "2 runs. All saw 19,200 examples in training. Scores"),
        (
            [{"examples_seen": 90, "epochs": 0.25}] * 2,
            "All saw 90 examples in training, 0.25 of an epoch: an under-tra",
        ),
        ([{"examples_seen": 90, "epochs": 2.0}] * 2, "All saw 90 examples in training. Scores"),
        (
            [{"images_seen": 90}, {"images_seen": 64}],
            "They did not see the same number of examples in training: 64 to 90.",
        ),
        ([{}, {}], "2 runs. Scores"),
    ],
)
def test_the_report_says_what_was_seen(seen, words, tmp_path):
    for seed, found in enumerate(seen):
        folder = tmp_path / "runs" / f"smear-seed{seed}"
        write_run(folder, (5, 6), seed=seed)
        write_json(folder / "metrics.json", read_json(folder / "metrics.json") | found)
    report.main([str(tmp_path / "runs"), "--out", str(tmp_path / "out")])
    assert words in (tmp_path / "out" / "README.md").read_text()


def test_the_same_folders_give_the_same_bytes_and_small_parts_suffice(runs, tmp_path):
    folders = [str(folder) for folder in runs.iterdir()]
    for out, places in (("one", [str(runs)]), ("two", sorted(folders, reverse=True))):
        report.main([*places, "--out", str(tmp_path / out), "--keep", str(tmp_path / "kept")])
    parts = [
        "README.md",
        "index.html",
        *(f"routing-{row}.png" for row in ("1x_parameters", "smear", "smear_no_dropout")),
        "scores.csv",
        *(f"similarity-{row}.png" for row in ("1x_parameters", "smear", "smear_no_dropout")),
        "tables.tex",
    ]
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == parts
    for part in parts:
        assert (tmp_path / "one" / part).read_bytes() == (tmp_path / "two" / part).read_bytes()
    assert sorted(p.name for p in (tmp_path / "kept" / "smear-seed0").iterdir()) == [
        "config.yaml", "metrics.json", "routing.json"]  # fmt: skip
    assert sorted(p.name for p in (tmp_path / "kept").iterdir() if p.is_file()) == [
        "README.md", "scores.csv", "tables.tex"]  # fmt: skip
    text = (tmp_path / "one" / "README.md").read_text()
    assert (tmp_path / "kept" / "README.md").read_text() == text.partition("\n![")[0].rstrip() + "\n"
    report.main([str(tmp_path / "kept"), "--out", str(tmp_path / "again")])
    assert (tmp_path / "again" / "scores.csv").read_bytes() == (tmp_path / "one" / "scores.csv").read_bytes()
    assert "Those of 0 runs were computed again from their predictions, those of 9 are as recorded" in (
        (tmp_path / "again" / "README.md").read_text()
    )


def test_speed_stands_beside_the_rows_that_were_measured(runs, tmp_path, capsys):
    write_json(tmp_path / "speed.json", {"rows": {"smear": {"train images/s": 123.4, "peak MB": 1500}}})
    report.main([str(runs), "--out", str(tmp_path / "out"), "--speed", str(tmp_path / "speed.json")])
    text = capsys.readouterr().out
    assert cells(text, "Scores", "smear")[-2:] == ["123.4", "1,500.0"]
    assert cells(text, "Scores", "1x_parameters")[-2:] == ["–", "–"]


def test_kept_reports_have_the_picture_over_all_rows_and_the_log(runs, tmp_path):
    write_json(tmp_path / "speed.json", {"rows": {"smear": {"test images/s": 50.0}, "1x_parameters": {}}})
    write_lines(runs / "smear-seed0" / "log.jsonl", [{"step": 3, "seconds": 1.5}])
    places = ["--out", str(tmp_path / "out"), "--keep", str(tmp_path / "kept"), "--speed", str(tmp_path / "speed.json")]
    report.main([str(runs), *places])
    kept = tmp_path / "kept"
    assert [path.name for path in kept.rglob("*.png")] == ["figure2.png"]
    assert [line for line in (kept / "README.md").read_text().splitlines() if line.startswith("![")] == [
        "![Score against speed: above is better, to the right is faster](figure2.png)"
    ]
    assert json.loads((kept / "smear-seed0" / "log.jsonl").read_text()) == {"step": 3, "seconds": 1.5}


def test_validation_scores_are_what_a_budget_is_chosen_by(runs, tmp_path, capsys):
    validation = {"domains": {"drawn": 0.25, "seen": 0.75}, "micro": 0.5, "macro": 0.5}
    for folder in runs.iterdir():
        write_json(folder / "metrics.json", read_json(folder / "metrics.json") | {"validation": validation})
    report.main([str(runs), "--out", str(tmp_path / "out"), "--split", "validation"])
    text = capsys.readouterr().out
    assert cells(text, "Scores", "smear")[1:5] == ["25.0 ± 0.0", "75.0 ± 0.0", "50.0 ± 0.0", "50.0 ± 0.0"]
    assert "Scores are percentages on validation examples" in (tmp_path / "out" / "README.md").read_text()
    report.main([str(runs), "--out", str(tmp_path / "out")])
    assert cells(capsys.readouterr().out, "Scores", "smear")[1] == "63.3 ± 5.8"
    assert "Scores are percentages on test examples" in (tmp_path / "out" / "README.md").read_text()


def test_validation_scores_must_be_there(runs, tmp_path):
    with pytest.raises(ValueError, match="1x_parameters-seed0 has no validation scores"):
        report.main([str(runs), "--out", str(tmp_path / "out"), "--split", "validation"])


def test_figures_that_do_not_follow_from_the_predictions_are_refused(runs, tmp_path):
    file = runs / "smear-seed1" / "predictions.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[0]["prediction"] = 1 - rows[0]["prediction"]
    write_lines(file, rows)
    with pytest.raises(ValueError, match=r"smear-seed1: predictions.jsonl gives drawn 60\.0000, metrics.json has 70"):
        report.main([str(runs), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 4, "seed": 9}, "differ in steps"),
        ({"seed": 1}, "has a seed twice"),
    ],
)
def test_runs_that_are_no_row_are_refused(change, message, runs, tmp_path):
    write_run(runs / "smear-seed9", (5, 5), **change)
    with pytest.raises(ValueError, match=message):
        report.main([str(runs), "--out", str(tmp_path / "out")])


def test_what_is_no_run_is_told(tmp_path, runs):
    with pytest.raises(FileNotFoundError, match=r"no metrics\.json"):
        report.main([str(tmp_path), "--out", str(tmp_path / "out")])
    with pytest.raises(ValueError, match="There is no row ensemble; possible: smear, smear_no_dropout, 1x_parameters"):
        report.main([str(runs), "--out", str(tmp_path / "out"), "--reference", "ensemble"])


def test_runs_of_the_t5_recipe(tmp_path, capsys):
    found = t5_glue(command(tmp_path / "runs" / "smear-seed0", max_steps=2, eval_steps=2, save_steps=2, seed=0))
    report.main([str(tmp_path / "runs"), "--out", str(tmp_path / "out")])
    row = cells(capsys.readouterr().out, "Scores", "smear")
    assert row[-4] == f"{found['average']['metrics']:.1f}"
    assert len(row) == 1 + 4 + 2 + 2  # four numbers of three tasks, two averages, seeds, trained
