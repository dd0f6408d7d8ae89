"""The README.md of a run folder: what was trained, how to load it, what it scored."""

from __future__ import annotations

from typing import Any

TEMPLATE = """---
library_name: peft
pipeline_tag: image-classification
tags: [smear, mixture-of-experts, timm]
---
# {routing} on {base}

Trained by `recipes/resnet_domainnet.py` with the settings in `config.yaml`, seed {seed}: {seen:,} images seen in
{seconds:.0f} s, {adapter:,} numbers trained in the adapter and {head:,} in the new head. The base is frozen. The
figures are those of the **{reported}** adapter (step {step:,}), which lies in `adapter/`.

## Accuracy on the test images

| domain | accuracy |
| --- | --- |
{rows}

`metrics.json` holds these figures, `predictions.jsonl` every prediction, and `routing.json` the mean routing
distribution per site and domain.

## Load it

```python
{loading}
```
"""


def run_card(config: dict[str, Any], metrics: dict[str, Any], classes: int) -> str:
    """Markdown with front matter.

    Args:
        config: the job's settings, as in `config.yaml`.
        metrics: as in `metrics.json`.
        classes: outputs of the head.
    """
    scores = {**metrics["domains"], "**micro**": metrics["micro"], "**macro**": metrics["macro"]}
    return TEMPLATE.format(
        routing=config["routing"],
        base=config["base"],
        seed=config["seed"],
        seen=metrics["images_seen"],
        reported=metrics["reported"],
        step=metrics["reported_step"],
        seconds=metrics["seconds"]["train"],
        rows="\n".join(f"| {name} | {score:.3f} |" for name, score in scores.items()),
        loading="\n".join(loading_lines(config, classes, "adapter")),
        **metrics["trained_parameters"],
    )


def loading_lines(config: dict[str, Any], classes: int, adapter: str) -> list[str]:
    """Three lines of Python that load what a job trained onto its base.

    Args:
        config: the job's settings.
        classes: outputs of the head.
        adapter: the folder `adapter/` of the run.
    """
    if config["weights"] is None:
        first = "import timm, smear_peft"
        base = f'base = timm.create_model("{config["base"]}", pretrained=True, num_classes={classes})'
    else:
        first = "import smear_peft; from recipes.image_models import load_adapted, load_base"
        base = f'base = load_base("{config["base"]}", "{config["weights"]}")'
    if config["routing"] == "linear_probe":
        return [first, base, f'model = load_adapted(base, Path("{adapter}"), {classes})']
    return [first, base, f'model = smear_peft.load(base, "{adapter}")']
