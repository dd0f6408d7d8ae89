"""Run folders appear whole or not at all."""

import json

import pytest

from recipes.run_folder import read_json, read_yaml, write_json, write_lines, write_yaml, writing


def test_a_folder_appears_when_it_is_complete(tmp_path):
    target = tmp_path / "runs" / "mine"
    with writing(target) as place:
        write_json(place / "metrics.json", {"micro": 0.5})
        write_yaml(place / "config.yaml", {"routing": "smear", "seed": 1})
        write_lines(place / "predictions.jsonl", [{"a": 1}, {"a": 2}])
        assert not target.exists()
    assert read_json(target / "metrics.json") == {"micro": 0.5}
    assert read_yaml(target / "config.yaml") == {"routing": "smear", "seed": 1}
    assert [json.loads(line)["a"] for line in (target / "predictions.jsonl").read_text().splitlines()] == [1, 2]
    assert [path.name for path in target.parent.iterdir()] == ["mine"]


def test_a_failed_job_leaves_what_was_there(tmp_path):
    target = tmp_path / "mine"
    with writing(target) as place:
        write_json(place / "metrics.json", {"micro": 0.5})
    with pytest.raises(RuntimeError, match="in the middle"), writing(target) as place:
        write_json(place / "metrics.json", {"micro": 0.9})
        raise RuntimeError("in the middle")
    assert read_json(target / "metrics.json") == {"micro": 0.5}
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_new_run_replaces_the_old_one_as_a_whole(tmp_path):
    target = tmp_path / "mine"
    with writing(target) as place:
        write_json(place / "old.json", 1)
    with writing(target) as place:
        write_json(place / "new.json", 2)
    assert [path.name for path in target.iterdir()] == ["new.json"]


def test_nan_is_refused(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "metrics.json", {"micro": float("nan")})
    assert not list(tmp_path.iterdir())
