"""Accuracies of predictions by domain, without anything of the images."""

from __future__ import annotations

from typing import Any

from smear_peft.metrics.domain_accuracy.domain_accuracy import domain_accuracies


def by_domain(predictions: list[int], labels: list[int], domains: list[str]) -> dict[str, Any]:
    """Shares of right predictions, in [0, 1].

    Returns:
        "domains": one per domain, in the order in which they first occur; "micro": over all images (the paper's
        "Final"); "macro": mean over domains.
    """
    found = domain_accuracies(predictions, labels, domains)
    ordered = {name: found[f"accuracy_{name}"] for name in dict.fromkeys(domains)}
    return {"domains": ordered, "micro": found["accuracy_micro"], "macro": found["accuracy_macro"]}
