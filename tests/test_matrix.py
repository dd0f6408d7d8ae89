"""README.md's table of features by architecture is the one that the tests' marks make."""

import pytest

from . import matrix


def test_the_table_in_the_readme_is_up_to_date():
    text = matrix.README.read_text()
    assert matrix.updated(text) == text, "run: python -m tests.matrix"


def test_a_renamed_test_and_a_misspelt_feature_show(tmp_path, monkeypatch):
    file = tmp_path / "test_some.py"
    file.write_text('@pytest.mark.feature("gradient accumulation", "T5", "ResNet")\n@slow\ndef test_one(): ...\n')
    assert list(matrix.marks(tmp_path)) == [
        ("gradient accumulation", "T5", "test_some.py", "test_one", "slow"),
        ("gradient accumulation", "ResNet", "test_some.py", "test_one", "slow"),
    ]
    monkeypatch.setattr(matrix, "FEATURES", matrix.FEATURES[1:])
    with pytest.raises(ValueError, match=r"no feature 'every routing method"):
        matrix.table()
