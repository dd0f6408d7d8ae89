"""From generated answers to the paper's eleven numbers: post-processing, pooling, averages.

    python -m recipes.glue_scoring runs/mine/predictions.jsonl

An answer is a dict with "task", "idx", "template", "prediction" and "reference", and with "choices" for
`scoring="choices"`. All figures are in percent, as in the paper's table 2.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from recipes.glue_data import TASKS
from smear_peft.metrics.smear_glue.smear_glue import glue_metrics

Answer = Mapping[str, Any]

# The published post-processing (r-three/smear, data/postprocessors.py): words that mean one label, whatever the task.
WORDS: dict[str, int] = {
    **dict.fromkeys(("yes", "entailment", "equivalent", "acceptable", "positive", "good", "happy", "duplicates"), 1),
    **dict.fromkeys(("true", "correct", "always", "guaranteed"), 1),
    **dict.fromkeys(("no", "not entailment", "not equivalent", "unacceptable", "negative", "bad", "sad"), 0),
    **dict.fromkeys(("not duplicates", "false", "incorrect", "never", "impossible"), 0),
    **dict.fromkeys(("neither", "inconclusive", "sometimes", "maybe", "possible"), 2),
}
INVALID = -1
SCORINGS = ("published", "choices")


def published_label(task: str, text: str) -> float:
    """What a text counts as in the published scoring: 0, 1 or 2, a score for stsb, -1 if it is neither.

    Texts that Python reads as infinite or not a number count as -1 too; in the published code a single one of them
    makes the whole task's figure 0.
    """
    text = text.strip().lower()
    if task != "stsb":
        return WORDS.get(text, INVALID)
    try:
        score = float(text)
    except ValueError:
        return INVALID
    return score if math.isfinite(score) else INVALID


def _labels(answer: Answer, scoring: str) -> tuple[float, float]:
    """(prediction, reference) as labels."""
    task, prediction, reference = answer["task"], answer["prediction"], answer["reference"]
    if scoring == "published" or task == "stsb":
        right = published_label(task, reference)
        given = published_label(task, prediction)
    else:
        choices = [choice.strip().lower() for choice in answer["choices"] or ()]
        right, given = (
            choices.index(text) if (text := raw.strip().lower()) in choices else INVALID
            for raw in (reference, prediction)
        )
    if right == INVALID:
        raise ValueError(
            f"{task}, template {answer['template']!r}: the right answer {reference!r} is no label in scoring "
            f"{scoring!r}, so nothing could be right. scoring='choices' reads answers by the template's own "
            "answer_choices; 'published' knows the words of PromptSource's GLUE templates alone."
        )
    return given, right


def score_task(answers: Sequence[Answer], scoring: str = "published") -> dict[str, float]:
    """A task's metrics over all of its answers together, in percent.

    Args:
        answers: of one task, each with "prediction" and "reference"; pairs of example and template are pooled.
        scoring: "published", by the authors' list of words; "choices", by each template's own choices.

    Returns:
        By name as in `evaluate`'s GLUE; 0 where a correlation is undefined because all answers are equal.

    Raises:
        ValueError: there are no answers, the scoring is unknown, or a right answer is no label.
    """
    if scoring not in SCORINGS:
        raise ValueError(f"scoring={scoring!r} is unknown; possible: {', '.join(SCORINGS)}.")
    if not answers:
        raise ValueError("There are no answers to score.")
    predictions, references = zip(*(_labels(answer, scoring) for answer in answers), strict=True)
    values = glue_metrics(answers[0]["task"], predictions, references)
    return {name: 0.0 if math.isnan(value) else 100 * value for name, value in values.items()}


def score(answers: Iterable[Answer], scoring: str = "published") -> dict[str, Any]:
    """Everything that a run's answers say.

    Args:
        answers: of any number of tasks, each (task, idx, template) once.
        scoring: see `score_task`.

    Returns:
        "tasks": each task's metrics. "average": "metrics", the mean over all metrics (with eight tasks the paper's
        average of eleven numbers, in which mrpc, stsb and qqp count twice), and "tasks", the mean over tasks of the
        mean of their metrics. "templates": per task, each template's metrics. "spread": per task, the lowest, highest
        and standard deviation over templates of the mean of its metrics. "answers": per task, how many, and how many of
        them are no label.

    Raises:
        ValueError: an answer occurs twice, or see `score_task`.
    """
    tasks: dict[str, list[Answer]] = defaultdict(list)
    seen = set()
    for answer in answers:
        key = (answer["task"], answer["idx"], answer["template"])
        if key in seen:
            raise ValueError(f"The answer to task, idx and template {key} occurs more than once.")
        seen.add(key)
        tasks[answer["task"]].append(answer)
    if not tasks or not tasks.keys() <= TASKS.keys():
        raise ValueError(f"Tasks of the answers: {', '.join(tasks) or 'none'}; possible: {', '.join(TASKS)}.")
    metrics = {name: score_task(rows, scoring) for name, rows in tasks.items()}
    templates = {name: _by_template(rows, scoring) for name, rows in tasks.items()}
    return {
        "tasks": metrics,
        "average": {
            "metrics": statistics.fmean(value for values in metrics.values() for value in values.values()),
            "tasks": statistics.fmean(_mean(values) for values in metrics.values()),
        },
        "spread": {name: _spread([_mean(values) for values in table.values()]) for name, table in templates.items()},
        "templates": templates,
        "answers": {
            name: {"number": len(rows), "no_label": sum(_is_no_label(row, scoring) for row in rows)}
            for name, rows in tasks.items()
        },
    }


def _is_no_label(answer: Answer, scoring: str) -> bool:
    label, names = _labels(answer, scoring)[0], TASKS[answer["task"]].labels
    return label == INVALID if names is None else label not in range(len(names))


def _by_template(answers: Sequence[Answer], scoring: str) -> dict[str, dict[str, float]]:
    groups: dict[str, list[Answer]] = defaultdict(list)
    for answer in answers:
        groups[answer["template"]].append(answer)
    return {name: score_task(groups[name], scoring) for name in sorted(groups)}


def _mean(metrics: Mapping[str, float]) -> float:
    return statistics.fmean(metrics.values())


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"lowest": min(values), "highest": max(values), "deviation": statistics.pstdev(values)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the figures of a run's answers."""
    (file,) = sys.argv[1:] if arguments is None else arguments
    with Path(file).open(encoding="utf-8") as lines:
        print(json.dumps(score(map(json.loads, lines)), indent=2))


if __name__ == "__main__":
    main()
