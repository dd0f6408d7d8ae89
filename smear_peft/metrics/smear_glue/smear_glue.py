"""GLUE's metrics, number for number those of `evaluate.load("glue", task)`, loaded by path and without a network.

Two things go beyond it, both for models that answer in words: a prediction that is no label (-1) is a wrong one for
accuracy, F1 and Matthews' correlation alike, and scores stay in float64 (`datasets` hands out numpy arrays in float32,
so this module asks for lists).
"""

from collections.abc import Callable, Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import f1_score, matthews_corrcoef

METRICS = {
    "cola": ("matthews_correlation",),
    "sst2": ("accuracy",),
    "mrpc": ("accuracy", "f1"),
    "stsb": ("pearson", "spearmanr"),
    "qqp": ("accuracy", "f1"),
    "mnli": ("accuracy",),
    "mnli_matched": ("accuracy",),
    "mnli_mismatched": ("accuracy",),
    "qnli": ("accuracy",),
    "rte": ("accuracy",),
    "wnli": ("accuracy",),
    "hans": ("accuracy",),
}

_DESCRIPTION = "The metrics of the GLUE benchmark (Wang et al., 2019); a prediction that is no label counts as wrong."
_CITATION = """\
@inproceedings{wang2019glue,
  title={{GLUE}: A Multi-Task Benchmark and Analysis Platform for Natural Language Understanding},
  author={Wang, Alex and Singh, Amanpreet and Michael, Julian and Hill, Felix and Levy, Omer and Bowman, Samuel R.},
  booktitle={International Conference on Learning Representations},
  year={2019}
}
"""
_INPUTS = """
Args:
    predictions: labels (integers, -1 where the answer was none), or scores from 0 to 5 for stsb.
    references: labels, or scores for stsb.
Returns, as fractions of 1:
    accuracy (sst2, mnli, mnli_matched, mnli_mismatched, qnli, rte, wnli, hans),
    accuracy and f1 (mrpc, qqp), pearson and spearmanr (stsb), matthews_correlation (cola).
"""


def accuracy(predictions: np.ndarray, references: np.ndarray) -> float:
    """The share of equal labels."""
    return float((predictions == references).mean())


def f1(predictions: np.ndarray, references: np.ndarray) -> float:
    """F1 of label 1. A prediction other than 0 and 1 counts as the wrong one of the two."""
    valid = np.isin(predictions, (0, 1))
    return float(f1_score(references, np.where(valid, predictions, 1 - references), zero_division=0.0))


def matthews_correlation(predictions: np.ndarray, references: np.ndarray) -> float:
    """Matthews' correlation; predictions of -1 are a class of their own."""
    return float(matthews_corrcoef(references, predictions))


def pearson(predictions: np.ndarray, references: np.ndarray) -> float:
    """Pearson's correlation; nan if either side is constant."""
    return _correlation(pearsonr, predictions, references)


def spearman(predictions: np.ndarray, references: np.ndarray) -> float:
    """Spearman's rank correlation; nan if either side is constant."""
    return _correlation(spearmanr, predictions, references)


def _correlation(function: Callable[..., Any], predictions: np.ndarray, references: np.ndarray) -> float:
    if np.ptp(predictions) == 0 or np.ptp(references) == 0:
        return float("nan")  # scipy says so too, after a warning
    return float(function(predictions, references)[0])


_FUNCTIONS = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews_correlation": matthews_correlation,
    "pearson": pearson,
    "spearmanr": spearman,
}


def glue_metrics(task: str, predictions: Sequence[float], references: Sequence[float]) -> dict[str, float]:
    """What the metric computes, as a plain function.

    Args:
        task: a key of `METRICS`.
        predictions: n labels, -1 for none, or n scores for stsb.
        references: n labels or scores.

    Returns:
        The task's metrics by their names in `evaluate`, as fractions of 1.

    Raises:
        ValueError: there is nothing to compare, or the two differ in length.
    """
    kind = np.float64 if task == "stsb" else np.int64
    given, right = np.asarray(predictions, dtype=kind), np.asarray(references, dtype=kind)
    if given.shape != right.shape or given.size == 0:
        raise ValueError(f"{task}: {given.size} predictions for {right.size} references.")
    return {name: _FUNCTIONS[name](given, right) for name in METRICS[task]}


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class SmearGlue(evaluate.Metric):
    """One GLUE task's metrics; the configuration's name is the task's."""

    def _info(self) -> evaluate.MetricInfo:
        if self.config_name not in METRICS:
            raise KeyError(f"smear_glue needs a task, not {self.config_name!r}; possible: {', '.join(METRICS)}.")
        value = datasets.Value("float64" if self.config_name == "stsb" else "int64")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": value, "references": value}),
            reference_urls=["https://gluebenchmark.com"],
        )

    def _compute(self, predictions: list[float], references: list[float]) -> dict[str, float]:
        return glue_metrics(self.config_name, predictions, references)
