"""GLUE's eight tasks from wherever they lie, checked, and split as Mahabadi et al. (2021) split them.

    glue = load_glue("nyu-mll/glue")                        # the Hub
    glue = load_glue("../shared/data/glue")                 # <task>/<split>.jsonl, or <task>/<split>-*.parquet
    glue = load_glue("tiny", tasks=("rte", "cola"))         # a few dozen rows a task, written for this project
    glue["rte"].train[0]                                    # {'sentence1': ..., 'sentence2': ..., 'label': 0, 'idx': 0}

Whatever the source, a task's rows have the same columns and types, and the same seed gives the same splits.
"""

from __future__ import annotations

import difflib
import glob
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pyarrow.parquet
import torch

HUB = "nyu-mll/glue"
TINY = Path(__file__).parent / "tiny_glue"
VALIDATION_ROWS = 1000


@dataclass(frozen=True)
class Task:
    """What a GLUE task's rows look like.

    Args:
        texts: names of the text columns.
        labels: names of the classes, by label; None for scores from 0 to 5.
        validation: the official split that holds labelled rows for evaluation.
    """

    texts: tuple[str, ...]
    labels: tuple[str, ...] | None
    validation: tuple[str, ...] = ("validation",)

    @property
    def features(self) -> datasets.Features:
        """Columns and types of every split. Scores are float32 as on the Hub, so that 0.7 rounds alike everywhere."""
        label = datasets.Value("float32" if self.labels is None else "int64")
        return datasets.Features(
            {**{name: datasets.Value("string") for name in self.texts}, "label": label, "idx": datasets.Value("int64")}
        )


# In the order of the published code (r-three/smear), whose task list gives the routing tags.
TASKS: dict[str, Task] = {
    "rte": Task(("sentence1", "sentence2"), ("entailment", "not_entailment")),
    "sst2": Task(("sentence",), ("negative", "positive")),
    "mrpc": Task(("sentence1", "sentence2"), ("not_equivalent", "equivalent")),
    "stsb": Task(("sentence1", "sentence2"), None),
    "qqp": Task(("question1", "question2"), ("not_duplicate", "duplicate")),
    "mnli": Task(
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        ("validation_mismatched", "validation_matched"),
    ),
    "qnli": Task(("question", "sentence"), ("entailment", "not_entailment")),
    "cola": Task(("sentence",), ("unacceptable", "acceptable")),
}
HALVED = ("cola", "rte", "mrpc", "stsb")  # validation and test are the halves of the official validation split


class Splits(NamedTuple):
    """One task's rows."""

    train: datasets.Dataset
    validation: datasets.Dataset
    test: datasets.Dataset


def load_glue(
    source: str = HUB,
    tasks: Sequence[str] = tuple(TASKS),
    data_seed: int = 42,
    drop_last_example: bool = False,
    revision: str | None = None,
) -> dict[str, Splits]:
    """The tasks' rows, checked and split.

    Args:
        source: a data set on the Hub in nyu-mll/glue's layout, a folder in the same layout, or "tiny".
        tasks: which of `TASKS`.
        data_seed: of the permutations that cut the splits.
        drop_last_example: lose the last row of each split, as the published code does (r-three/smear,
            hyperformer/data/p3_tasks.py reads "all" as `[:-1]`).
        revision: of the data set on the Hub.

    Raises:
        ValueError: a task is unknown, or rows are not what the task's rows must be.
        FileNotFoundError: the folder, or a task's file in it, does not exist.
        ConnectionError: the Hub cannot be reached; the message says what works without it.
    """
    if not tasks:
        raise ValueError(f"No tasks. Possible: {', '.join(TASKS)}.")
    for name in tasks:
        if name not in TASKS:
            near = difflib.get_close_matches(name, TASKS, 1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            raise ValueError(f"Unknown GLUE task {name!r}{hint}; possible: {', '.join(TASKS)}.")
    return {name: _split(name, source, data_seed, drop_last_example, revision) for name in tasks}


def split_indices(task: str, train: int, data_seed: int, validation: int = 0) -> tuple[Sequence[int], ...]:
    """Mahabadi et al.'s rule, as in r-three/smear (hyperformer/data/p3_tasks.py).

    Args:
        task: its name.
        train: rows of the official train split.
        data_seed: of the permutation.
        validation: rows of the official validation split, for the tasks that halve it.

    Returns:
        For rte, mrpc, stsb and cola: the rows of the official validation split that are for validation and for test.
        For sst2, qqp and qnli: the rows of the official train split that are for validation and for training; 1,000
        are for validation, or half of them if there are fewer than 2,000.
    """
    count = validation if task in HALVED else train
    order = torch.randperm(count, generator=torch.Generator().manual_seed(data_seed)).tolist()
    cut = count // 2 if task in HALVED else min(VALIDATION_ROWS, count // 2)
    return order[:cut], order[cut:]


def _split(name: str, source: str, data_seed: int, drop_last_example: bool, revision: str | None) -> Splits:
    task = TASKS[name]
    train = _read(source, name, "train", revision)
    held_out = [_read(source, name, split, revision) for split in task.validation]
    if name in HALVED:
        first, second = split_indices(name, len(train), data_seed, len(held_out[0]))
        splits = Splits(train, held_out[0].select(first), held_out[0].select(second))
    elif name == "mnli":
        splits = Splits(train, held_out[0], held_out[1])
    else:
        first, second = split_indices(name, len(train), data_seed)
        splits = Splits(train.select(second), train.select(first), held_out[0])
    if drop_last_example:
        splits = Splits(*(split.select(range(len(split) - 1)) for split in splits))
    for part, rows in splits._asdict().items():
        if not len(rows):
            raise ValueError(f"{name}: {source} has too few rows, nothing is left for {part}.")
    return splits


def _read(source: str, task: str, split: str, revision: str | None) -> datasets.Dataset:
    """One official split from any source, checked."""
    folder = TINY if source == "tiny" else Path(source).expanduser()
    if not folder.is_dir():
        if folder.exists() or folder.is_absolute() or source.startswith(".") or source.count("/") != 1:
            raise FileNotFoundError(f"The data set {source} is no folder, no name on the Hub ({HUB}), and not 'tiny'.")
        rows = _from_hub(source, task, split, revision)
        return checked(rows.to_dict(), task, f"{source}, {task}, {split}", _classes(rows))
    stem = folder / task / split
    lines, shards = stem.with_suffix(".jsonl"), sorted(glob.glob(f"{glob.escape(str(stem))}-*.parquet"))
    if lines.is_file():
        return checked(_json_lines(lines), task, str(lines))
    if shards:
        tables = [datasets.Dataset(pyarrow.parquet.read_table(shard)) for shard in shards]
        rows = datasets.concatenate_datasets(tables)
        return checked(rows.to_dict(), task, f"{stem}-*.parquet", _classes(rows))
    raise FileNotFoundError(f"Neither {lines} nor {stem}-*.parquet exists.")


def _from_hub(source: str, task: str, split: str, revision: str | None) -> datasets.Dataset:
    try:
        return datasets.load_dataset(source, task, split=split, revision=revision)
    except (ConnectionError, FileNotFoundError) as error:
        raise ConnectionError(
            f"{source} cannot be had: {error}. Without the Hub, --dataset takes a folder of <task>/<split>.jsonl or "
            "<task>/<split>-*.parquet, or 'tiny'."
        ) from error


def _classes(rows: datasets.Dataset) -> tuple[str, ...] | None:
    return tuple(getattr(rows.features.get("label"), "names", None) or ()) or None


def _json_lines(file: Path) -> dict[str, list[Any]]:
    rows = []
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{file}, line {number} is no JSON: {error}.") from error
            if not isinstance(row, dict):
                raise ValueError(f"{file}, line {number} holds {line.strip()[:40]!r}; expected an object.")
            rows.append(row)
    return {column: [row.get(column) for row in rows] for column in dict.fromkeys(key for row in rows for key in row)}


def checked(
    columns: Mapping[str, list[Any]], name: str, where: str, classes: tuple[str, ...] | None = None
) -> datasets.Dataset:
    """A task's rows with exactly its columns and types, or an error that names the place.

    Args:
        columns: of any source; those that the task does not have are left out, a missing `idx` is the row's number.
        name: the task.
        where: for messages.
        classes: the names of the labels, if the source has any.

    Raises:
        ValueError: a column is missing, a text is none, classes have another order, or a label is none of the task's.
    """
    task = TASKS[name]
    columns = {"idx": list(range(len(next(iter(columns.values()), [])))), **columns}
    missing = [column for column in task.features if column not in columns]
    if missing:
        raise ValueError(f"{where}: no column {', '.join(missing)}; found {', '.join(columns)}.")
    if classes is not None and classes != task.labels:
        raise ValueError(f"{where}: the classes are {classes}; {name} has {task.labels}, in that order.")
    for column in task.texts:
        _refuse(columns, column, lambda text: not isinstance(text, str), "which is no text", where)
    _refuse(columns, "label", lambda label: not _is_label(label, task), _expected(task), where)
    return datasets.Dataset.from_dict({c: columns[c] for c in task.features}, features=task.features)


def _refuse(
    columns: Mapping[str, list[Any]], column: str, is_bad: Callable[[Any], bool], what: str, where: str
) -> None:
    for number, value in enumerate(columns[column]):
        if is_bad(value):
            raise ValueError(f"{where}, row {number}: {column} is {value!r}, {what}.")


def _is_label(label: Any, task: Task) -> bool:
    if isinstance(label, bool) or not isinstance(label, int | float) or not math.isfinite(label):
        return False
    return 0 <= label <= 5 if task.labels is None else label in range(len(task.labels))


def _expected(task: Task) -> str:
    possible = "a score from 0 to 5" if task.labels is None else f"a whole number from 0 to {len(task.labels) - 1}"
    return f"expected {possible} (-1 marks GLUE's test splits, which have no labels)"
