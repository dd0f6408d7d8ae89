"""Run folders appear complete or not at all."""

import json

import pytest

from recipes.run_folder import read_json, read_yaml, write_json, write_lines, write_yaml, writing


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_appears_only_when_its_block_has_ended(tmp_path):
    target = tmp_path / "runs" / "mine"
    with writing(target) as folder:
        write_json(folder / "metrics.json", {"micro": 0.5})
        assert not target.exists()
    assert read_json(target / "metrics.json") == {"micro": 0.5}
    assert names(tmp_path / "runs") == ["mine"]


def test_a_failed_block_leaves_the_old_folder_as_it_was(tmp_path):
    target = tmp_path / "mine"
    with writing(target) as folder:
        write_json(folder / "metrics.json", {"micro": 0.5})
    with pytest.raises(RuntimeError, match="power cut"), writing(target) as folder:  # noqa: PT012
        write_json(folder / "metrics.json", {"micro": 0.9})
        raise RuntimeError("power cut")
    assert read_json(target / "metrics.json") == {"micro": 0.5}
    assert names(tmp_path) == ["mine"]


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    target = tmp_path / "mine"
    for name in ("old.json", "new.json"):
        with writing(target) as folder:
            write_json(folder / name, {})
    assert names(target) == ["new.json"]
    assert names(tmp_path) == ["mine"]


def test_files_read_back(tmp_path):
    write_yaml(tmp_path / "config.yaml", {"steps": 3, "base": None, "learning_rate": 0.001})
    assert read_yaml(tmp_path / "config.yaml") == {"steps": 3, "base": None, "learning_rate": 0.001}
    write_lines(tmp_path / "predictions.jsonl", [{"name": "a", "label": 1}, {"name": "b", "label": 2}])
    lines = (tmp_path / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["label"] for line in lines] == [1, 2]


def test_nan_is_refused_and_leaves_no_file(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "metrics.json", {"micro": float("nan")})
    assert names(tmp_path) == []
