"""From answers to the paper's eleven numbers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from recipes.glue_data import TASKS, load_glue
from recipes.glue_scoring import main, published_label, score, score_task
from recipes.prompts import ask, original_templates, templates_folder
from tests.recipes.small import ROOT

ORACLE = json.loads((Path(__file__).parents[1] / "fixtures" / "oracle" / "misc.json").read_text())
OWN = Path(__file__).parents[2] / "recipes" / "templates"
NAMES = {
    "acc": "accuracy",
    "mcc": "matthews_correlation",
    "pearson_corrcoef": "pearson",
    "spearman_corrcoef": "spearmanr",
}


def answer(task: str, prediction: str, reference: str, idx: int = 0, template: str = "t", **more) -> dict:
    return {"task": task, "idx": idx, "template": template, "prediction": prediction, "reference": reference, **more}


def oracle_answers(task: str) -> list[dict]:
    entry = ORACLE["scoring"][task]
    pairs = zip(entry["predictions"], entry["references"], strict=True)
    return [answer(task, given, right, idx, f"t{idx % 2}") for idx, (given, right) in enumerate(pairs)]


@pytest.mark.parametrize("task", ORACLE["scoring"])
def test_every_task_has_the_authors_numbers(task):
    expected = {NAMES.get(name, name): value for name, value in ORACLE["scoring"][task]["metrics"].items()}
    assert score_task(oracle_answers(task)) == pytest.approx(expected, rel=1e-12)


def test_the_average_is_that_of_eleven_numbers_and_the_mean_over_tasks_is_told_apart():
    report = score([row for task in ORACLE["scoring"] for row in oracle_answers(task)])
    assert sum(len(values) for values in report["tasks"].values()) == 11
    assert report["average"]["metrics"] == pytest.approx(ORACLE["scoring_average"], rel=1e-12)
    means = [sum(values.values()) / len(values) for values in report["tasks"].values()]
    assert report["average"]["tasks"] == pytest.approx(sum(means) / 8)
    assert report["average"]["tasks"] != pytest.approx(report["average"]["metrics"], abs=0.5)


def test_the_papers_row_for_smear_averages_to_its_81_point_6():
    """Table 2: 81.6 is the mean of eleven numbers; the mean over eight tasks would be 79.2."""
    row = [[69.9], [90.9], [90.5, 86.9], [87.0, 86.6], [86.9, 90.1], [84.9], [90.2], [33.8]]
    numbers = [value for values in row for value in values]
    assert sum(numbers) / 11 == pytest.approx(81.6, abs=0.05)
    assert sum(sum(values) / len(values) for values in row) / 8 == pytest.approx(79.2, abs=0.05)


def test_metrics_are_pooled_over_examples_and_templates():
    """One F1 over all pairs is not the mean of the templates' F1."""
    rows = [
        answer("mrpc", "yes", "yes", 0, "a"), answer("mrpc", "no", "yes", 1, "a"), answer("mrpc", "no", "no", 2, "a"),
        answer("mrpc", "yes", "no", 0, "b"), answer("mrpc", "yes", "no", 1, "b"), answer("mrpc", "yes", "yes", 2, "b"),
    ]  # fmt: skip
    report = score(rows)
    assert report["tasks"]["mrpc"]["f1"] == pytest.approx(100 * 4 / 7)
    templates = report["templates"]["mrpc"]
    assert templates["a"] == {"accuracy": pytest.approx(200 / 3), "f1": pytest.approx(200 / 3)}
    assert templates["b"] == {"accuracy": pytest.approx(100 / 3), "f1": pytest.approx(50)}
    means = [200 / 3, (100 / 3 + 50) / 2]
    spread = report["spread"]["mrpc"]
    assert (spread["lowest"], spread["highest"]) == (pytest.approx(means[1]), pytest.approx(means[0]))
    assert spread["deviation"] == pytest.approx((means[0] - means[1]) / 2)


@pytest.mark.parametrize(
    ("task", "text", "label"),
    [
        ("rte", " Entailment\n", 1), ("rte", "not entailment", 0), ("mnli", "Maybe", 2), ("qqp", "not duplicates", 0),
        ("cola", "yes.", -1), ("cola", "", -1), ("rte", "1", -1), ("sst2", "happy", 1),
        ("stsb", "3.8", 3.8), ("stsb", " 5 ", 5.0), ("stsb", "three", -1), ("stsb", "yes", -1),
        ("stsb", "nan", -1), ("stsb", "inf", -1), ("stsb", "1e999", -1),
    ],
)  # fmt: skip
def test_texts_become_labels(task, text, label):
    assert published_label(task, text) == label


def test_one_answer_that_reads_as_not_a_number_does_not_void_the_task():
    rows = [answer("stsb", given, str(i), i) for i, given in enumerate(["0.0", "1.0", "nan", "3.0", "4.0"])]
    assert score_task(rows)["spearmanr"] > 50


def test_equal_answers_throughout_score_zero_where_there_is_no_correlation():
    assert score_task([answer("stsb", "2.0", str(i), i) for i in range(4)]) == {"pearson": 0.0, "spearmanr": 0.0}
    assert score_task([answer("cola", "yes", w, i) for i, w in enumerate(["yes", "no"])]) == {"matthews_correlation": 0}


def test_answers_that_are_no_label_are_counted():
    rows = [answer("rte", word, "yes", i) for i, word in enumerate(["yes", "maybe", "certainly"])]
    assert score(rows)["answers"]["rte"] == {"number": 3, "no_label": 2}
    rows = [answer("mnli", word, "yes", i) for i, word in enumerate(["yes", "maybe", "certainly"])]
    assert score(rows)["answers"]["mnli"] == {"number": 3, "no_label": 1}


def test_both_scorings_agree_on_every_template_of_promptsource(promptsource):
    """An answer in a template's own words means the same label by the authors' list and by the template's choices."""
    for task, splits in load_glue("tiny").items():
        rows = []
        for number, row in enumerate(splits.train):
            for template in original_templates(promptsource, task):
                asked = ask(template, row)
                wrong = asked.choices[(row["label"] + number) % len(asked.choices)] if asked.choices else "2.0"
                prediction = wrong if number % 3 == 0 else asked.target
                rows.append(answer(task, prediction, asked.target, row["idx"], template.name, choices=asked.choices))
        assert score_task(rows, "choices") == pytest.approx(score_task(rows, "published")), task
        assert len(rows) == len(splits.train) * len(original_templates(promptsource, task))


def test_templates_with_words_of_their_own_are_scored_by_their_choices():
    choices = ["Ja", "Nein"]
    rows = [answer("rte", given, "Ja", i, choices=choices) for i, given in enumerate(["ja", "nein", "x", "Ja "])]
    assert score_task(rows, "choices") == {"accuracy": 50.0}
    with pytest.raises(ValueError, match=r"template 't': the right answer 'Ja' is no label .*scoring='choices'"):
        score_task(rows)


@pytest.mark.parametrize("task", TASKS)
def test_the_templates_of_this_project_are_in_the_authors_words(task):
    for row in load_glue("tiny", [task])[task].train:
        for template in original_templates(templates_folder(OWN), task):
            assert published_label(task, ask(template, row).target) != -1


def test_an_answer_given_twice_is_an_error():
    with pytest.raises(ValueError, match=r"\('rte', 0, 't'\) occurs more than once"):
        score([answer("rte", "yes", "yes"), answer("rte", "no", "yes")])


@pytest.mark.parametrize("rows", [[], [answer("squad", "a", "b")]])
def test_no_answers_and_unknown_tasks_are_errors(rows):
    with pytest.raises(ValueError, match=r"Tasks of the answers: (none|squad); possible: rte, sst2"):
        score(rows)


def test_an_unknown_scoring_is_an_error():
    with pytest.raises(ValueError, match="scoring='strict' is unknown; possible: published, choices"):
        score([answer("rte", "yes", "yes")], "strict")


def test_the_command_prints_the_figures_of_a_file(tmp_path, capsys):
    file = tmp_path / "predictions.jsonl"
    rows = oracle_answers("rte")
    rows[0]["note"] = "a line separator \u2028 inside a text ends no line"
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    main([str(file)])
    assert json.loads(capsys.readouterr().out)["tasks"] == {"rte": {"accuracy": pytest.approx(80.0)}}


def test_it_starts_as_a_script(tmp_path):
    file = tmp_path / "predictions.jsonl"
    file.write_text(json.dumps(answer("rte", "yes", "yes")) + "\n")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "recipes/glue_scoring.py", str(file)],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["tasks"]["rte"] == {"accuracy": 100.0}
