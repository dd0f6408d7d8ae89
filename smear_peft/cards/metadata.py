"""The head of a card: what the Hub reads, and a check of it without the Hub."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from smear_peft.cards.data_sets import RESEARCH_USE, DataSet, data_set_of
from smear_peft.cards.hub_names import LICENCES, PIPELINES, RELATIONS
from smear_peft.cards.runs import CLASSES, IMAGES, TEXT, Run, mean_and_deviation

METHOD_TAGS = ("smear", "mixture-of-experts")
LANGUAGE = re.compile(r"[a-z]{2,3}|multilingual|code")
ID = re.compile(r"[\w.-]+(/[\w.-]+)?", re.ASCII)
EVALUATE = {"pearson": "pearsonr"}
"""Names of metrics whose modules the Hub calls otherwise."""
TASKS = {
    IMAGES: ("image-classification", "Image classification"),
    TEXT: ("text2text-generation", "Text to text"),
    CLASSES: ("text-classification", "Text classification"),
}
LICENCE_FILE = "LICENSE.md"
RESEARCH = {"license": "other", "license_name": RESEARCH_USE, "license_link": LICENCE_FILE}


def metadata_of(
    runs: Sequence[Run], name: str, base_model: str | None, tags: Sequence[str] = (), licence: str | None = None
) -> ModelCardData:
    """The head of a card for runs that differ in their seed alone.

    Args:
        runs: at least one.
        name: of the model.
        base_model: its id on the Hub; None if it has none.
        tags: further ones.
        licence: id of the Hub's list; None: what the data allow.
    """
    run, data = runs[0], data_set_of(runs[0])
    adapter = run.routing != "linear_probe"
    own = list(METHOD_TAGS) if adapter else []
    own += [run.routing] if run.routing not in own else []
    task = TASKS[run.kind]
    optional: dict[str, Any] = {"license": licence or data.licence}
    if optional["license"] == RESEARCH_USE:
        optional = dict(RESEARCH)
    if base_model:
        optional |= {"base_model": base_model, "base_model_relation": "adapter" if adapter else "finetune"}
    if data.hub:
        optional["datasets"] = [data.hub]
    if data.language:
        optional["language"] = data.language
    return ModelCardData(
        model_name=name,
        library_name="peft" if adapter else "timm" if run.kind == IMAGES else "transformers",
        pipeline_tag=task[0],
        tags=list(dict.fromkeys([*own, *tags])),
        eval_results=results_of(runs, data, task),
        metrics=sorted({EVALUATE.get(number.metric, number.metric) for number in run.numbers()}),
        **optional,
    )


def results_of(runs: Sequence[Run], data: DataSet, task: tuple[str, str]) -> list[EvalResult]:
    """Every number of runs that differ in their seed alone: means, with the standard deviation among the arguments."""
    run, found = runs[0], []
    for place, number in enumerate(run.numbers()):
        mean, deviation = mean_and_deviation([some.numbers()[place].value for some in runs])
        seeds: dict[str, Any] = {"seeds": [some.seed for some in runs]}
        spread = {} if deviation is None else {"standard_deviation": round(deviation, 6)}
        title = number.metric if number.part else number.title
        found.append(
            EvalResult(
                task_type=task[0],
                task_name=task[1],
                dataset_type=data.type,
                dataset_name=f"{data.name}, {number.part}" if number.part else data.name,
                dataset_config=number.part,
                dataset_split=run.metrics.get("scored_on", "test" if run.kind == IMAGES else None),
                metric_type=EVALUATE.get(number.metric, number.metric),
                metric_name=title if deviation is None else f"{title}, mean of {len(runs)} seeds",
                metric_value=round(mean, 6),
                metric_args=seeds | spread,
            )
        )
    return found


def check_card(text: str) -> None:
    """Refuse a card that the Hub would refuse, or that says something else than it seems to; without the Hub.

    Args:
        text: a whole card, with its head.

    Raises:
        ValueError: with everything that is wrong, field by field.
    """
    match = re.match(r"---\n(.*?)\n---\n", text, re.S)
    if match is None:
        raise ValueError("The card has no metadata: it must begin with a line ---, YAML, and another line ---.")
    fields = yaml.safe_load(match.group(1))
    if not isinstance(fields, dict):
        raise ValueError("The card's metadata are no YAML mapping of fields.")
    wrong = [*_wrong_ids(fields), *_wrong_terms(fields), *_wrong_results(fields)]
    if wrong:
        raise ValueError(f"The Hub would refuse this card: {'; '.join(wrong)}.")


def _wrong_ids(fields: dict[str, Any]) -> list[str]:
    wrong = []
    for name in ("base_model", "datasets", "metrics", "tags"):
        value = fields.get(name, [])
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list) or not all(isinstance(one, str) and one for one in values):
            wrong.append(f"{name} is {value!r}, not a name or a list of them")
        elif name == "tags":
            wrong += [f"tag {one!r} names a path" for one in values if re.search(r"(^|:)[/~.]", one)]
        else:
            wrong += [f"{name} holds {one!r}, which is no id on the Hub" for one in values if not _is_id(one)]
    return wrong


def _is_id(name: str) -> bool:
    return bool(ID.fullmatch(name)) and not name.startswith(".") and not ("/" in name and Path(name).exists())


def _wrong_terms(fields: dict[str, Any]) -> list[str]:
    known = {"license": LICENCES, "pipeline_tag": PIPELINES, "base_model_relation": RELATIONS}
    wrong = [
        f"{name} is {fields[name]!r}; known: {', '.join(sorted(values))}"
        for name, values in known.items()
        if name in fields and (not isinstance(fields[name], str) or fields[name] not in values)
    ]
    if fields.get("license") == "other" and not (fields.get("license_name") and fields.get("license_link")):
        wrong.append("license 'other' needs license_name and license_link")
    languages = fields.get("language", [])
    for language in [languages] if isinstance(languages, str) else languages:
        if not LANGUAGE.fullmatch(str(language)):
            wrong.append(f"language {language!r} is no ISO 639 code")
    return wrong


def _wrong_results(fields: dict[str, Any]) -> list[str]:
    wrong = []
    for model in fields.get("model-index", []):
        if not model.get("name"):
            wrong.append("model-index has no name")
        for result in model.get("results", []):
            if not result.get("task", {}).get("type"):
                wrong.append("a result has no task.type")
            if not all(result.get("dataset", {}).get(name) for name in ("type", "name")):
                wrong.append("a result has no dataset.type or dataset.name")
            for metric in result.get("metrics", []):
                value = metric.get("value")
                if not metric.get("type") or isinstance(value, bool) or not isinstance(value, int | float):
                    wrong.append(f"a metric has no type or no number: {metric}")
                elif not math.isfinite(value):
                    wrong.append(f"{metric.get('name') or metric['type']} is {value}")
    return wrong
