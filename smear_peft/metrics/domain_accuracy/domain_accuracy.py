"""Accuracy over several domains: of all examples together (micro), the mean over domains (macro), and per domain."""

from collections.abc import Sequence

import datasets
import evaluate
import numpy as np

_DESCRIPTION = "Accuracy over several domains: micro, macro and per domain."
_CITATION = """\
@inproceedings{peng2019moment,
  title={Moment Matching for Multi-Source Domain Adaptation},
  author={Peng, Xingchao and Bai, Qinxun and Xia, Xide and Huang, Zijun and Saenko, Kate and Wang, Bo},
  booktitle={International Conference on Computer Vision},
  year={2019}
}
"""
_INPUTS = """
Args:
    predictions: classes, as integers.
    references: classes, as integers.
    domains: the name of each example's domain.
Returns, as fractions of 1:
    accuracy_micro: over all examples (the "Final Accuracy" of the SMEAR paper's table 3),
    accuracy_macro: the mean over domains, each counted once,
    accuracy_<domain>: for each domain that occurs, in alphabetical order.
"""


def domain_accuracies(
    predictions: Sequence[int], references: Sequence[int], domains: Sequence[str]
) -> dict[str, float]:
    """What the metric computes, as a plain function.

    Args:
        predictions: n classes.
        references: n classes.
        domains: n names.

    Returns:
        `accuracy_micro`, `accuracy_macro`, and `accuracy_<domain>` for each domain that occurs, as fractions of 1.

    Raises:
        ValueError: there is nothing to compare, or the three differ in length.
    """
    right, names = np.asarray(predictions) == np.asarray(references), np.asarray(domains)
    if not len(predictions) == len(references) == len(domains) or right.size == 0:
        raise ValueError(f"{len(predictions)} predictions, {len(references)} references, {len(domains)} domains.")
    by_domain = {str(name): float(right[names == name].mean()) for name in np.unique(names)}
    return {
        "accuracy_micro": float(right.mean()),
        "accuracy_macro": float(np.mean(list(by_domain.values()))),
        **{f"accuracy_{name}": value for name, value in by_domain.items()},
    }


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class DomainAccuracy(evaluate.Metric):
    """Accuracy over several domains."""

    def _info(self) -> evaluate.MetricInfo:
        label = datasets.Value("int64")
        features = {"predictions": label, "references": label, "domains": datasets.Value("string")}
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features(features),
        )

    def _compute(self, predictions: list[int], references: list[int], domains: list[str]) -> dict[str, float]:
        return domain_accuracies(predictions, references, domains)
