"""Metrics as `evaluate` modules that load by path, without a network.

```python
metric = evaluate.load(smear_peft.metrics.path("smear_glue"), "mrpc")
metric.compute(predictions=[0, 1], references=[0, 1])  # {'accuracy': 1.0, 'f1': 1.0}
```

`evaluate` copies a module's single file into its cache before it imports it, so each one stands alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

NAMES = ("smear_glue", "domain_accuracy")


def path(name: str) -> str:
    """The folder to give to `evaluate.load`.

    Args:
        name: one of `NAMES`.

    Raises:
        ValueError: there is no such metric; the message lists those that are there.
    """
    if name not in NAMES:
        raise ValueError(f"There is no metric {name!r}; possible: {', '.join(NAMES)}.")
    return str(Path(__file__).parent / name)


def load_metric(name: str, config: str | None = None, **kwargs: Any) -> Any:
    """`evaluate.load` on a metric of this package.

    Args:
        name: one of `NAMES`.
        config: the GLUE task, for smear_glue.
        kwargs: passed on, such as `keep_in_memory` or `num_process` and `process_id`.

    Returns:
        An `evaluate.EvaluationModule`, good for `add_batch`, `compute` and `evaluate.combine`.

    Raises:
        ValueError: there is no such metric.
        KeyError: smear_glue without a task, or with an unknown one.
        ImportError: `evaluate` is not installed.
    """
    folder = path(name)
    try:
        import evaluate  # noqa: PLC0415 (an extra: the rest of smear_peft does not need it)
    except ImportError as error:
        raise ImportError("Metrics need the package `evaluate`: pip install 'smear-peft[recipes]'.") from error
    return evaluate.load(folder, config, **kwargs)
