"""GLUE from every kind of source, its checks and its splits."""

import json
import math
import re
from pathlib import Path
from typing import ClassVar

import datasets
import pytest

from recipes.glue_data import HUB, TASKS, TINY, load_glue, split_indices

ORACLE = json.loads((Path(__file__).parents[1] / "fixtures" / "oracle" / "misc.json").read_text())["splits"]


def write(folder: Path, task: str, split: str, rows: list[dict]) -> None:
    file = folder / task / f"{split}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def rte_rows(n: int, **changes) -> list[dict]:
    row = {"sentence1": "It rains.", "sentence2": "It is wet.", "label": 0}
    return [{**row, "label": i % 2, "idx": i, **changes} for i in range(n)]


def rte_folder(folder: Path, train: list[dict]) -> str:
    write(folder, "rte", "train", train)
    write(folder, "rte", "validation", rte_rows(6))
    return str(folder)


# The built-in rows


@pytest.mark.parametrize("task", TASKS)
def test_the_built_in_set_has_every_task_with_every_label(task):
    splits = load_glue("tiny", [task])[task]
    for part in splits:
        assert part.features == TASKS[task].features
        assert len(part) >= 6
    labels = {label for part in splits for label in part["label"]}
    if TASKS[task].labels is None:
        assert min(labels) == 0
        assert max(labels) == 5
    else:
        assert labels == set(range(len(TASKS[task].labels)))


def test_the_built_in_rows_share_no_text_between_train_and_the_rest():
    for name, splits in load_glue("tiny").items():
        texts = [{tuple(row[t] for t in TASKS[name].texts) for row in part} for part in splits]
        assert not texts[0] & (texts[1] | texts[2]), name
        assert not texts[1] & texts[2], name


# Splits


@pytest.mark.parametrize("name", ORACLE)
def test_halves_are_the_published_ones(name):
    """The published code loses each half's last row."""
    seed, count = map(int, re.findall(r"\d+", name))
    validation, test = split_indices("rte", 0, seed, count)
    assert validation[:-1] == ORACLE[name]["validation"]
    assert test[:-1] == ORACLE[name]["test"]
    assert sorted([*validation, *test]) == list(range(count))


def test_large_tasks_take_a_thousand_rows_of_train_for_validation():
    validation, train = split_indices("qqp", 5000, 42)
    assert len(validation) == 1000
    assert sorted([*validation, *train]) == list(range(5000))


def test_a_train_split_too_small_for_that_is_halved():
    validation, train = split_indices("qnli", 24, 42)
    assert len(validation) == len(train) == 12


def test_mnli_validates_on_mismatched_and_tests_on_matched():
    splits = load_glue("tiny", ["mnli"])["mnli"]
    mismatched = [json.loads(line) for line in (TINY / "mnli" / "validation_mismatched.jsonl").open()]
    assert list(splits.validation) == mismatched
    assert splits.test["premise"] != splits.validation["premise"]


def test_losing_the_last_example_of_each_split_is_an_option_and_off():
    for task in ("rte", "sst2", "mnli"):
        whole, cut = (load_glue("tiny", [task], drop_last_example=lose)[task] for lose in (False, True))
        for full, short in zip(whole, cut, strict=True):
            assert list(full)[:-1] == list(short)


def test_the_data_seed_decides_the_splits():
    first, same, other = (load_glue("tiny", ["cola"], data_seed=seed)["cola"] for seed in (42, 42, 43))
    assert list(first.test) == list(same.test)
    assert list(first.test) != list(other.test)
    assert list(first.train) == list(other.train)


# Sources


def as_on_the_hub(task: str, classes: bool = True) -> datasets.DatasetDict:
    """The built-in rows, labels as ClassLabel."""
    splits = {}
    for file in (TINY / task).glob("*.jsonl"):
        rows = datasets.Dataset.from_list([json.loads(line) for line in file.open()])
        if classes and TASKS[task].labels:
            rows = rows.cast_column("label", datasets.ClassLabel(names=list(TASKS[task].labels)))
        splits[file.stem] = rows
    return datasets.DatasetDict(splits)


def as_parquet(folder: Path, task: str, classes: bool = True) -> None:
    """As the Hub's files: `<task>/<split>-0000i-of-0000n.parquet`."""
    (folder / task).mkdir(parents=True, exist_ok=True)
    for split, rows in as_on_the_hub(task, classes).items():
        for part in range(2):
            shard = rows.shard(2, part, contiguous=True)
            shard.to_parquet(folder / task / f"{split}-0000{part}-of-00002.parquet")


def as_downloaded(cache: Path, task: str) -> None:
    """As `datasets` keeps what it once had from the Hub."""
    splits = as_on_the_hub(task)

    class Builder(datasets.ArrowBasedBuilder):
        BUILDER_CONFIGS: ClassVar = [datasets.BuilderConfig(name=task)]

        def _info(self):
            return datasets.DatasetInfo(features=next(iter(splits.values())).features)

        def _split_generators(self, dl_manager):
            return [datasets.SplitGenerator(name=name, gen_kwargs={"name": name}) for name in splits]

        def _generate_tables(self, name):
            yield 0, splits[name].data.table

    builder = Builder(cache_dir=str(cache), config_name=task, dataset_name="glue", repo_id=HUB, hash="revision")
    builder.download_and_prepare(verification_mode="no_checks")


@pytest.mark.parametrize("task", TASKS)
def test_parquet_gives_the_same_rows_as_json_lines(task, tmp_path):
    """mnli is the trap: read without naming files, its two validation splits become one."""
    as_parquet(tmp_path, task)
    lines, parquet = load_glue("tiny", [task])[task], load_glue(str(tmp_path), [task])[task]
    for a, b in zip(lines, parquet, strict=True):
        assert a.features == b.features
        assert list(a) == list(b)


def test_the_real_rows_are_read_and_split(real_data):
    glue = load_glue(str(real_data / "glue"))
    sizes = {task: tuple(len(part) for part in splits) for task, splits in glue.items()}
    assert sizes == {  # the rows of the folder's DATA.md, cut by Mahabadi et al.'s rule
        "rte": (2490, 138, 139),
        "sst2": (19000, 1000, 872),
        "mrpc": (3668, 204, 204),
        "stsb": (5749, 750, 750),
        "qqp": (6999, 1000, 2000),
        "mnli": (9999, 800, 5000),
        "qnli": (8999, 1000, 5000),
        "cola": (8551, 521, 522),
    }
    for name, splits in glue.items():
        assert all(part.features == TASKS[name].features for part in splits)


def test_scores_have_the_hubs_precision_whatever_the_source(tmp_path):
    """As float64, 0.7 times 5 rounds to 4; as the Hub's float32, to 3: the answers would differ by a step."""
    rows = [{"sentence1": "a", "sentence2": "b", "label": 0.7} for _ in range(4)]
    write(tmp_path, "stsb", "train", rows)
    write(tmp_path, "stsb", "validation", rows)
    label = load_glue(str(tmp_path), ["stsb"])["stsb"].train[0]["label"]
    assert round(5 * label) == 3
    assert label == pytest.approx(0.7)


def test_surplus_columns_are_left_out_and_idx_is_made_if_missing(tmp_path):
    rows = [{k: v for k, v in row.items() if k != "idx"} | {"note": "x"} for row in rte_rows(4)]
    train = load_glue(rte_folder(tmp_path, rows), ["rte"])["rte"].train
    assert train.column_names == ["sentence1", "sentence2", "label", "idx"]
    assert train["idx"][:] == [0, 1, 2, 3]


@pytest.mark.parametrize("task", ["mnli", "stsb"])
def test_what_was_once_had_from_the_hub_gives_the_same_rows(task, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    as_downloaded(tmp_path, task)
    lines, hub = load_glue("tiny", [task])[task], load_glue(tasks=[task])[task]
    for a, b in zip(lines, hub, strict=True):
        assert a.features == b.features
        assert list(a) == list(b)


def test_without_the_hub_the_message_says_what_works(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match=f"{HUB} cannot be had.*folder of <task>/<split>.jsonl.*'tiny'"):
        load_glue(HUB, ["rte"])


# Bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": -1}, r"row 0: label is -1, expected a whole number from 0 to 1 \(-1 marks GLUE's test splits"),
        ({"label": 2}, "row 0: label is 2, expected a whole number from 0 to 1"),
        ({"label": "0"}, "row 0: label is '0'"),
        ({"label": None}, "row 0: label is None"),
        ({"label": 0.5}, "row 0: label is 0.5"),
        ({"label": True}, "row 0: label is True"),
        ({"label": math.nan}, "row 0: label is nan"),
        ({"sentence2": None}, "row 0: sentence2 is None, which is no text"),
        ({"sentence1": 7}, "row 0: sentence1 is 7, which is no text"),
    ],
)
def test_a_bad_row_is_named(tmp_path, change, message):
    with pytest.raises(ValueError, match=r"train\.jsonl, " + message):
        load_glue(rte_folder(tmp_path, rte_rows(4, **change)), ["rte"])


def test_a_row_that_lacks_a_field_is_named(tmp_path):
    rows = rte_rows(4)
    del rows[2]["sentence1"]
    with pytest.raises(ValueError, match="row 2: sentence1 is None"):
        load_glue(rte_folder(tmp_path, rows), ["rte"])


@pytest.mark.parametrize("score", [-1.0, 5.1, math.inf])
def test_a_score_outside_0_to_5_is_named(tmp_path, score):
    rows = [{"sentence1": "a", "sentence2": "b", "label": 1.0}, {"sentence1": "a", "sentence2": "b", "label": score}]
    write(tmp_path, "stsb", "train", rows)
    write(tmp_path, "stsb", "validation", rows)
    with pytest.raises(ValueError, match=r"row 1: label is .*expected a score from 0 to 5"):
        load_glue(str(tmp_path), ["stsb"])


def test_a_missing_column_is_named(tmp_path):
    rows = [{"question1": "a", "label": 1}] * 4
    with pytest.raises(ValueError, match="no column sentence1, sentence2; found idx, question1, label"):
        load_glue(rte_folder(tmp_path, rows), ["rte"])


def test_classes_in_another_order_are_refused(tmp_path):
    as_parquet(tmp_path, "rte", classes=False)
    file = next((tmp_path / "rte").glob("train-00000*"))
    rows = datasets.Dataset.from_parquet(str(file), cache_dir=str(tmp_path / "cache"))
    rows.cast_column("label", datasets.ClassLabel(names=["not_entailment", "entailment"])).to_parquet(file)
    (tmp_path / "rte" / "train-00001-of-00002.parquet").unlink()
    with pytest.raises(ValueError, match=r"classes are \('not_entailment', 'entailment'\); rte has"):
        load_glue(str(tmp_path), ["rte"])


@pytest.mark.parametrize(
    ("line", "message"), [('{"label": 0', "line 2 is no JSON"), ("[1]", r"line 2 holds '\[1\]'; expected an object")]
)
def test_a_broken_line_is_named(tmp_path, line, message):
    folder = rte_folder(tmp_path, rte_rows(1))
    with (tmp_path / "rte" / "train.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=message):
        load_glue(folder, ["rte"])


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"Neither .*rte/train\.jsonl nor .*rte/train-\*\.parquet exists"):
        load_glue(str(tmp_path), ["rte"])


@pytest.mark.parametrize("source", ["./no/such/folder", "glue", "a/b/c"])
def test_what_is_neither_a_folder_nor_on_the_hub_is_refused_without_asking_the_hub(source):
    with pytest.raises(FileNotFoundError, match=f"The data set {source} is no folder"):
        load_glue(source, ["rte"])


def test_an_unknown_task_is_told_with_the_nearest_one():
    with pytest.raises(ValueError, match=r"'sst-2' \(did you mean sst2\?\)"):
        load_glue("tiny", ["sst-2"])


def test_no_tasks_are_an_error():
    with pytest.raises(ValueError, match="No tasks"):
        load_glue("tiny", [])


def test_too_few_rows_to_split_are_an_error(tmp_path):
    write(tmp_path, "rte", "train", rte_rows(4))
    write(tmp_path, "rte", "validation", rte_rows(1))
    with pytest.raises(ValueError, match="too few rows, nothing is left for validation"):
        load_glue(str(tmp_path), ["rte"])
