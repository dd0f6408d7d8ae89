"""The `evaluate` modules: loaded by path without a network, equal to scikit-learn's and SciPy's numbers."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import evaluate
import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as sk

from smear_peft import metrics
from smear_peft.metrics.domain_accuracy.domain_accuracy import domain_accuracies
from smear_peft.metrics.smear_glue.smear_glue import METRICS, SmearGlue, glue_metrics

TASKS = sorted(METRICS)


def labels(task: str, n: int = 200) -> tuple[list[float], list[float]]:
    rng = np.random.default_rng(len(task))
    if task == "stsb":
        references = rng.integers(0, 26, n) / 5
        return (references + rng.normal(0, 1, n)).tolist(), references.tolist()
    references = rng.integers(0, 3 if task.startswith(("mnli", "hans")) else 2, n)
    noise = rng.random(n) < 0.3
    return np.where(noise, rng.permutation(references), references).tolist(), references.tolist()


def expected(task: str, predictions: list[float], references: list[float]) -> dict[str, float]:
    """evaluate's definitions, with the two libraries that it calls."""
    if task == "cola":
        return {"matthews_correlation": sk.matthews_corrcoef(references, predictions)}
    if task == "stsb":
        return {
            "pearson": stats.pearsonr(predictions, references)[0],
            "spearmanr": stats.spearmanr(predictions, references)[0],
        }
    values = {"accuracy": sk.accuracy_score(references, predictions)}
    if task in ("mrpc", "qqp"):
        values["f1"] = sk.f1_score(references, predictions)
    return values


@pytest.mark.parametrize("task", TASKS)
def test_smear_glue_has_the_numbers_of_sklearn_and_scipy(task):
    predictions, references = labels(task)
    metric = evaluate.load(metrics.path("smear_glue"), task)
    got = metric.compute(predictions=predictions, references=references)
    assert got == pytest.approx(expected(task, predictions, references), rel=1e-12)
    assert got == glue_metrics(task, predictions, references)


def test_batches_give_what_one_call_gives():
    predictions, references = labels("mrpc")
    metric = metrics.load_metric("smear_glue", "mrpc")
    for at in range(0, 200, 64):
        metric.add_batch(predictions=predictions[at : at + 64], references=references[at : at + 64])
    assert metric.compute() == glue_metrics("mrpc", predictions, references)


def test_the_class_works_without_the_loader():
    predictions, references = labels("rte")
    metric = SmearGlue(config_name="rte", keep_in_memory=True)
    assert metric.compute(predictions=predictions, references=references) == glue_metrics(
        "rte", predictions, references
    )


def test_modules_combine_by_object_and_by_path():
    predictions, references = labels("rte")
    both = evaluate.combine(
        {"rte": metrics.load_metric("smear_glue", "rte"), "cola": metrics.load_metric("smear_glue", "cola")},
        force_prefix=True,
    )
    got = both.compute(predictions=predictions, references=references)
    assert set(got) == {"rte_accuracy", "cola_matthews_correlation"}
    assert got["cola_matthews_correlation"] == pytest.approx(sk.matthews_corrcoef(references, predictions))


def test_a_prediction_that_is_no_label_counts_as_wrong():
    predictions, references = [1, 0, -1, -1, 2], [1, 0, 1, 0, 1]
    got = glue_metrics("mrpc", predictions, references)
    assert got == {
        "accuracy": pytest.approx(2 / 5),
        "f1": pytest.approx(sk.f1_score(references, [1, 0, 0, 1, 0])),
    }
    assert glue_metrics("cola", predictions, references)["matthews_correlation"] == pytest.approx(
        sk.matthews_corrcoef(references, predictions)
    )


def test_inputs_are_left_as_they_are():
    predictions, references = np.array([1, -1]), np.array([1, 0])
    glue_metrics("qqp", predictions, references)
    assert predictions.tolist() == [1, -1]


def test_constant_scores_have_no_correlation(recwarn):
    got = glue_metrics("stsb", [2.0, 2.0, 2.0], [1.0, 2.0, 3.0])
    assert math.isnan(got["pearson"])
    assert math.isnan(got["spearmanr"])
    assert not recwarn.list


def test_one_class_only_is_scored_without_warnings(recwarn):
    assert glue_metrics("mrpc", [0, 0], [0, 0]) == {"accuracy": 1.0, "f1": 0.0}
    assert glue_metrics("cola", [1, 1], [1, 0]) == {"matthews_correlation": 0.0}
    assert not recwarn.list


@pytest.mark.parametrize("task", [None, "mrcp"])
def test_an_unknown_task_is_an_error_that_lists_the_tasks(task):
    with pytest.raises(KeyError, match=r"needs a task.*cola.*mrpc"):
        metrics.load_metric("smear_glue", task)


def test_an_unknown_metric_is_an_error_that_lists_the_metrics():
    with pytest.raises(ValueError, match="smear_glue, domain_accuracy"):
        metrics.path("glue")


@pytest.mark.parametrize(("predictions", "references"), [([], []), ([1], [1, 0])])
def test_unequal_or_empty_inputs_are_errors(predictions, references):
    with pytest.raises(ValueError, match=f"rte: {len(predictions)} predictions for {len(references)} references"):
        glue_metrics("rte", predictions, references)


def test_domain_accuracy_is_micro_macro_and_per_domain():
    metric = metrics.load_metric("domain_accuracy")
    metric.add_batch(predictions=[0, 1, 2], references=[0, 1, 1], domains=["real", "real", "real"])
    metric.add_batch(predictions=[3], references=[0], domains=["sketch"])
    assert metric.compute() == {
        "accuracy_micro": pytest.approx(2 / 4),
        "accuracy_macro": pytest.approx((2 / 3 + 0) / 2),
        "accuracy_real": pytest.approx(2 / 3),
        "accuracy_sketch": 0.0,
    }


def test_domain_accuracy_of_the_papers_table_3_is_sample_weighted():
    """SMEAR's domains, weighted by the official test sizes, give the paper's 62.0; their plain mean does not."""
    # The domains' figures have one decimal, so the mean is right within 0.1 points.
    table = {
        "clipart": (0.642, 14604),
        "infograph": (0.312, 15582),
        "painting": (0.578, 21850),
        "quickdraw": (0.623, 51750),
        "real": (0.743, 52041),
        "sketch": (0.560, 20916),
    }
    right = [int(i < round(share * n)) for share, n in table.values() for i in range(n)]
    domains = [name for name, (_, n) in table.items() for _ in range(n)]
    got = domain_accuracies(right, [1] * len(right), domains)
    assert got["accuracy_micro"] == pytest.approx(0.620, abs=1e-3)
    assert got["accuracy_macro"] == pytest.approx(0.576, abs=1e-3)


def test_domain_accuracy_refuses_unequal_lengths():
    with pytest.raises(ValueError, match="2 predictions, 2 references, 1 domains"):
        domain_accuracies([0, 1], [0, 1], ["real"])


def test_a_fresh_machine_without_network_loads_the_modules(tmp_path):
    """In a process of its own, with empty caches."""
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_EVALUATE_OFFLINE": "1"}
    glue, domains = (metrics.path(name) for name in ("smear_glue", "domain_accuracy"))
    code = f"""
import evaluate
print(evaluate.load({glue!r}, "mrpc").compute(predictions=[0, 1], references=[0, 1])["f1"])
print(evaluate.load({domains!r}).compute(predictions=[0], references=[0], domains=["real"])["accuracy_real"])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1.0", "1.0"]


@pytest.mark.parametrize("name", metrics.NAMES)
def test_modules_stand_alone_and_import_one_name_a_line(name):
    """`evaluate` copies the one file and reads its imports line by line with a regular expression."""
    text = (Path(metrics.path(name)) / f"{name}.py").read_text()
    assert not re.search(r"^\s*import .*,", text, re.MULTILINE)
    assert not re.search(r"^\s*(from|import) (\.|smear_peft|recipes)", text, re.MULTILINE)
