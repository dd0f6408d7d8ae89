"""FSDP2 with two gloo processes, all in one launch (tests/fsdp_worker.py): training, saving, generating."""

import pytest

from .launch import on_two_processes

TRAINED = {"T5": 102, "T5, tag": 62, "T5, checkpoints": 102, "ResNet": 30, "any other": 18}
"""Parameters that the worker's cases train."""


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, dict]:
    return on_two_processes("fsdp_worker", tmp_path_factory.mktemp("fsdp"))


@pytest.mark.feature("FSDP2: training, saving", "T5", "ResNet", "any other")
@pytest.mark.parametrize("case", TRAINED)
def test_training_is_that_of_one_process(case, found):
    assert found[case]["trained"] == TRAINED[case]
    assert found[case]["gradients"] < 1e-5
    assert found[case]["parameters"] < 1e-4


@pytest.mark.feature("FSDP2: training, saving", "T5", "ResNet", "any other")
@pytest.mark.parametrize("case", TRAINED)
def test_the_saved_adapter_is_that_of_one_process(case, found):
    assert found[case]["file"] < 1e-4
    assert found[case]["reloaded"] < 1e-6


@pytest.mark.feature("FSDP2: `generate` from gathered parameters", "T5")
@pytest.mark.parametrize("case", [case for case in TRAINED if case.startswith("T5")])
def test_generating_from_gathered_parameters(case, found):
    assert found[case]["tokens"]
    assert found[case]["again"]
    assert "got mixed torch.Tensor and DTensor" in found[case]["error"]
