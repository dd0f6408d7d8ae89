"""Every method under torch DDP with two gloo processes, all in one launch (tests/distributed_worker.py)."""

import pytest

from smear_peft import ROUTINGS

from .launch import on_two_processes

SOFT = ["smear", "ensemble", "dselect_k", "latent_skills"]
WITHOUT_DRAWS = ["smear", "ensemble", "top_k", "dselect_k", "soft_moe", "tag", "hash", "single"]


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[str, dict[str, float]]:
    return on_two_processes("distributed_worker", tmp_path_factory.mktemp("distributed"))


@pytest.mark.parametrize("routing", [*ROUTINGS, "dselect_k, top1"])
def test_every_parameter_has_the_same_gradient_on_all_ranks(routing, found):
    assert found[routing]["missing"] == 0
    assert found[routing]["ranks"] == 0


@pytest.mark.parametrize("routing", SOFT)
@pytest.mark.feature("DDP without `find_unused_parameters`", "T5")
def test_soft_routing_needs_no_search_for_unused_parameters(routing, found):
    assert found[f"{routing}, plain"]["missing"] == 0
    assert found[f"{routing}, plain"]["ranks"] == 0


@pytest.mark.parametrize("routing", WITHOUT_DRAWS)
@pytest.mark.feature("DDP without `find_unused_parameters`", "T5")
def test_gradients_are_those_of_one_process(routing, found):
    assert found[routing]["one process"] < 2e-3
    assert found[f"{routing}, plain"]["one process"] < 2e-3


@pytest.mark.parametrize("routing", ["smear", "adamix", "tag"])
@pytest.mark.feature("DDP without `find_unused_parameters`", "ResNet")
def test_batch_norms_and_two_passes(routing, found):
    """Buffers are broadcast before each forward, and AdaMix makes two before its backward."""
    assert found[f"{routing}, images"]["missing"] == 0
    assert found[f"{routing}, images"]["ranks"] == 0


@pytest.mark.parametrize("routing", ["dselect_k", "reinforce"])
def test_trainer(routing, found):
    assert found[f"{routing}, trainer"]["ranks"] == 0
    assert found[f"{routing}, trainer"]["sum"] == pytest.approx(1, rel=1e-5)
    if routing == "dselect_k":  # reinforce draws its experts
        assert found[f"{routing}, trainer"]["task"] == pytest.approx(1, rel=1e-4)
