"""Adapters after surgery are adapters: saved, reloaded, copied, compiled, through every door."""

import copy
import json

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

import smear_peft
from smear_peft import SmearConfig, freeze_experts, remove_experts, rename_experts, split_expert
from smear_peft.regroup import blocks_of

from .experts import SHARING, answer
from .models import tiny_t5
from .routed import close, enliven, extras, one_graph, routed
from .test_generation import generate, sources
from .test_staleness import with_act


@pytest.mark.parametrize("routing", SHARING)
@pytest.mark.parametrize("door", ["load", "peft", "low memory"])
def test_all_of_it_is_saved_and_reloads(routing, door, tmp_path):
    model = routed(routing=routing)
    rename_experts(model, ["a", "b", "c"])
    split_expert(model, "b", names=["d"])
    remove_experts(model, "a")
    freeze_experts(model, ["b"])
    config = model.peft_config["default"]
    assert (config.expert_names, config.frozen_experts) == (["b", "c", "d"], [0])
    assert config.expert_origins == ["the adapter's own", "the adapter's own", "split of b"]
    assert config.expert_shares == [0.5, 1, 0.5]
    before = answer(model, "t5", **extras(routing, 4))
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["format_version"] == 2
    if door == "load":
        again = smear_peft.load(tiny_t5(), tmp_path, "other")
    else:
        again = PeftModel.from_pretrained(tiny_t5(), tmp_path, "other", low_cpu_mem_usage=door == "low memory")
    for name in ("expert_names", "expert_origins", "expert_shares", "frozen_experts", "num_experts"):
        assert getattr(again.peft_config["other"], name) == getattr(config, name)
    assert torch.equal(answer(again, "t5", **extras(routing, 4)), before)
    split_expert(again, "b")
    torch.testing.assert_close(answer(again, "t5", **extras(routing, 4)), before, rtol=0, atol=1e-4)


def test_adapters_without_surgery_are_written_as_version_1(tmp_path):
    routed().save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["format_version"] == 1
    assert not {"expert_names", "expert_origins", "expert_shares", "frozen_experts"} & set(saved)


def test_the_temperature_of_a_long_annealing_stays():
    model = routed(routing="st_gumbel")
    smear_peft.set_temperature(model, 0.7)
    split_expert(model, 0)
    assert {block.routing.temperature for block in blocks_of(model, "default").values()} == {0.7}


def test_half_precision_experts_are_frozen_as_they_are(tmp_path):
    model = routed(tiny_t5().bfloat16())
    before = answer(model, "t5")
    freeze_experts(model, [1])
    assert torch.equal(answer(model, "t5"), before)
    model.save_pretrained(tmp_path)
    assert torch.equal(answer(smear_peft.load(tiny_t5().bfloat16(), tmp_path), "t5"), before)


def test_other_doors_open_to_adapters_after_surgery(tmp_path):
    model = routed()
    split_expert(model, 1)
    freeze_experts(model, [0, 3])
    before = answer(model, "t5")
    assert torch.equal(answer(copy.deepcopy(model), "t5"), before)
    model.save_pretrained(tmp_path)
    native = tiny_t5()
    native.load_adapter(str(tmp_path))
    assert torch.equal(answer(native, "t5"), before)
    assert torch.equal(answer(model.unload(), "t5"), answer(tiny_t5(), "t5"))


@one_graph
def test_a_compiled_model_takes_note_of_surgery():
    model = routed()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.equal(answer(compiled, "t5"), answer(model, "t5"))
    freeze_experts(compiled, [0])
    remove_experts(compiled, 2)
    assert torch.equal(answer(compiled, "t5"), answer(model, "t5"))


def test_surgery_on_an_adapter_of_transformers_itself(tmp_path):
    model = tiny_t5()
    model.add_adapter(SmearConfig(num_experts=3, bottleneck_dim=4), adapter_name="own")
    enliven(model)
    before = answer(model, "t5")
    split_expert(model, 0)
    assert model.peft_config["own"].num_experts == 4
    torch.testing.assert_close(answer(model, "t5"), before, rtol=0, atol=1e-4)
    model.save_pretrained(tmp_path)
    again = tiny_t5()
    again.load_adapter(str(tmp_path))
    assert torch.equal(answer(again, "t5"), answer(model, "t5"))


@torch.no_grad()
def write_frozen(model: nn.Module) -> None:
    draw = torch.Generator().manual_seed(3)
    for block in blocks_of(model, "default").values():
        frozen = block.expert.up.frozen_weight
        frozen.add_(0.5 * torch.randn(frozen.shape, generator=draw))


@pytest.mark.parametrize("act", [write_frozen, lambda model: remove_experts(model, 1)], ids=["frozen", "removed"])
def test_a_generate_under_way_takes_note_of_surgery(act):
    """Frozen experts are buffers, and removal puts other modules in place: both must be seen in the next step."""

    def answered(remember: bool) -> tuple[Tensor, Tensor]:
        model = routed()
        freeze_experts(model, 0)
        return generate(model, remember=remember, **sources(), logits_processor=with_act(lambda: act(model)))

    model = routed()
    found, expected = answered(True), answered(False)
    assert torch.equal(found[0], expected[0])
    close(found[1], expected[1])
    assert (found[1] - generate(model, **sources())[1]).abs().max() > 1e-2
