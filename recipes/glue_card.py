"""The README.md of a T5-GLUE run folder: what was trained, on what, how to load it, what it scored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TEMPLATE = """---
library_name: peft
tags: [smear, mixture-of-experts, t5]
---
# {routing} on {base}, GLUE

Trained by `recipes/t5_glue.py` with the settings in `config.yaml`: {steps:,} steps of {batch} examples, seed {seed},
data seed {data_seed}. {trained:,} numbers are trained, the base is frozen. The figures are those of the **{reported}**
adapter ({step}), which lies in `adapter/`; {kept} are kept.

## Test scores, in percent

Answers are generated greedily for every example with every template of its task, and scored together (`{scoring}`
scoring).

| task | metric | score | by template: lowest to highest |
| --- | --- | --- | --- |
{rows}
| **mean of the {count} numbers** | | **{metrics_average:.1f}** | |
| **mean of the {task_count} tasks** | | **{task_average:.1f}** | |

In the mean of the numbers, which is the paper's average, tasks with two metrics count twice.
{caution}
`metrics.json` holds these figures and more, `predictions.jsonl` every answer (`python -m recipes.glue_scoring
predictions.jsonl` makes the figures from it), and `routing.json` the mean routing distribution per site and task.

## Load it

```python
{loading}
```
"""

CAUTION = {
    "tiny": "The data are a few dozen sentences written for trying the recipe out: the scores mean nothing.\n",
    "random": "The base has random weights: the scores show that the machinery turns, and are not to be compared with "
    "the paper's.\n",
}


def glue_card(config: Mapping[str, Any], metrics: Mapping[str, Any]) -> str:
    """Markdown with front matter.

    Args:
        config: the run's settings, as in `config.yaml`.
        metrics: as in `metrics.json`.
    """
    numbers = [(task, name, value) for task, values in metrics["tasks"].items() for name, value in values.items()]
    rows = []
    for task, name, value in numbers:
        by_template = [values[name] for values in metrics["templates"][task].values()]
        rows.append(f"| {task} | {name} | {value:.1f} | {min(by_template):.1f} to {max(by_template):.1f} |")
    caution = [text for word, text in CAUTION.items() if word in (config["dataset"], config["base"])]
    return TEMPLATE.format(
        routing=config["routing"],
        base="a random T5" if config["base"] == "random" else config["base"],
        steps=metrics["steps"],
        batch=config["total_batch_size"],
        seed=config["seed"],
        data_seed=config["data_seed"],
        trained=metrics["trained_parameters"],
        reported=metrics["reported"],
        step=f"step {metrics['reported_step']:,}",
        kept=" and ".join(f"`adapter_{name}/`" for name in metrics["adapters"]),
        scoring=config["scoring"],
        rows="\n".join(rows),
        count=len(numbers),
        metrics_average=metrics["average"]["metrics"],
        task_count=len(metrics["tasks"]),
        task_average=metrics["average"]["tasks"],
        caution="\n".join(["", *caution]),
        loading="\n".join(loading_lines(config)),
    )


def loading_lines(config: Mapping[str, Any]) -> list[str]:
    """Python that loads the adapter of a run folder, from inside that folder."""
    base = "base" if config["base"] == "random" else config["base"]
    scaled = ["base.config.scale_decoder_outputs = True  # trained so"] if config["scale_logits"] else []
    return [
        "import smear_peft",
        "from transformers import T5ForConditionalGeneration",
        "",
        f'base = T5ForConditionalGeneration.from_pretrained("{base}")',
        *scaled,
        'model = smear_peft.load(base, "adapter")',
    ]
