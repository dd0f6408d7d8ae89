"""BatchNorms of base and blocks: what other libraries make of them, and whose setting holds the base's statistics."""

import copy
import warnings

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from timm.layers import freeze_batch_norm_2d
from torch import Tensor, nn

from smear_peft import SmearConfig, add_experts, load

from .adapters import SMALL
from .models import images, tiny_resnet, tiny_t5
from .routed import close, enliven

DRIFTS = "base_batch_norm='(train|drift)'.*save_pretrained does not hold them"
synced = nn.SyncBatchNorm.convert_sync_batchnorm


def fresh(base: nn.Module | None = None, **fields) -> nn.Module:
    return enliven(get_peft_model(tiny_resnet() if base is None else base, SmearConfig(**SMALL, **fields)))


def statistics(model: nn.Module, adapters: bool = False) -> dict[str, Tensor]:
    """Running statistics of the base, or those of the blocks."""
    buffers = ((name, buffer) for name, buffer in model.named_buffers() if "running" in name or "tracked" in name)
    return {name: buffer.clone() for name, buffer in buffers if (".smear_" in name) is adapters}


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    assert before
    assert before.keys() == after.keys()
    return [name for name, value in before.items() if not torch.equal(value, after[name])]


# modules that others put in a BatchNorm's place


@pytest.mark.parametrize("convert", [synced, freeze_batch_norm_2d])
def test_a_converted_model_answers_as_before(convert):
    model = fresh().eval()
    with torch.no_grad():
        wanted = model(images())
        again = convert(model)
        assert not any(isinstance(m, nn.BatchNorm2d) for m in again.modules())
        close(again(images()), wanted)


def test_a_converted_half_precision_model_answers_as_before():
    config = SmearConfig(**SMALL)
    model = enliven(get_peft_model(tiny_resnet().bfloat16(), config, autocast_adapter_dtype=False)).eval()
    x = images().bfloat16()
    with torch.no_grad():
        wanted = model(x)
        assert wanted.dtype == torch.bfloat16
        assert torch.equal(synced(model)(x), wanted)


@pytest.mark.parametrize("when", ["after", "before"])
def test_a_converted_model_trains_as_before(when):
    plain = fresh().train()
    model = (synced(fresh()) if when == "after" else fresh(synced(tiny_resnet()))).train()
    base, blocks = statistics(model), statistics(model, adapters=True)
    for seed in (1, 2):
        torch.manual_seed(seed)
        wanted = plain(images(seed=seed))
        torch.manual_seed(seed)
        close(model(images(seed=seed)), wanted)
    assert moved(base, statistics(model)) == []
    found = statistics(model, adapters=True)
    assert len(moved(blocks, found)) == len(blocks)
    for name, value in statistics(plain, adapters=True).items():
        close(found[name], value)


def test_a_converted_block_updates_its_statistics_once_under_checkpointing():
    found = []
    for saving in (False, True):
        model = synced(fresh(expert_dropout=0.0)).train()
        model.set_grad_checkpointing(saving)
        model(images()).square().sum().backward()
        found.append(statistics(model) | statistics(model, adapters=True))
    for name, value in found[1].items():
        close(value, found[0][name])


def test_a_converted_model_is_saved_and_loaded(tmp_path):
    model = synced(fresh()).train()
    model(images())
    model.eval().save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(load(tiny_resnet(), tmp_path).eval()(images()), model(images()))


def test_an_expert_is_copied_from_behind_a_converted_norm():
    model = fresh(base=tiny_resnet().double(), routing="tag", tasks=["art", "photo"])
    model.add_adapter("drawn", SmearConfig(routing="single", bottleneck_dim=4))
    enliven(model.double(), seed=5).train()
    model.set_adapter("drawn")
    model(images().double())  # its blocks' statistics are its own now
    model = synced(model).eval()
    with torch.no_grad():
        drawn = model(images().double())
        model.set_adapter("default")
        add_experts(model, ["sketch"], source="drawn", tasks=["sketch"])
        close(model(images().double(), routing_tags=torch.full((3,), 2)), drawn, 1e-10)


# whose setting holds


def test_the_active_adapters_say_whether_the_base_drifts():
    model = fresh().train()
    with pytest.warns(UserWarning, match=DRIFTS):
        model.add_adapter("second", SmearConfig(**SMALL, base_batch_norm="train"))
    for name, drifts in (("default", False), ("second", True), ("default", False)):
        model.set_adapter(name)
        before = statistics(model)
        model(images())
        assert bool(moved(before, statistics(model))) is drifts, name
    model.base_model.set_adapter(["default", "second"])
    before = statistics(model)
    model(images())
    assert moved(before, statistics(model)) == []


def test_a_frozen_base_stays_frozen_without_its_adapter():
    model = fresh().train()
    before = statistics(model)
    with model.disable_adapter():
        model(images())
    assert moved(before, statistics(model)) == []


def test_a_batch_norm_that_one_adapter_trains_in_full_is_held_under_another():
    model = fresh(modules_to_save=["layer4.0.bn2"]).train()
    model.add_adapter("second", SmearConfig(**SMALL))
    before = statistics(model)
    model(images())
    found = moved(before, statistics(model))
    assert len(found) == 3
    assert all("layer4.0.bn2.modules_to_save.default" in name for name in found)
    model.set_adapter("second")
    before = statistics(model)
    model(images())
    assert moved(before, statistics(model)) == []


def test_a_copy_holds_its_own_base():
    model = fresh().train()
    twin = copy.deepcopy(model)
    before = statistics(model)
    twin(images())
    assert moved(before, statistics(twin)) == []
    synced(twin)(images())
    assert moved(before, statistics(twin)) == []
    assert moved(before, statistics(model)) == []


@pytest.mark.parametrize("mode", [True, False])
def test_modes_are_what_they_were_after_a_forward_and_after_unload(mode):
    model = fresh().train(mode)
    modes = {name: module.training for name, module in model.named_modules()}
    model(images())
    with pytest.raises(RuntimeError):
        model(images(channels=4))
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {module.training for module in model.unload().modules()} == {mode}


@pytest.mark.filterwarnings("ignore:base_batch_norm=")
def test_drifted_statistics_are_loaded_from_beside_the_adapter(tmp_path):
    model = fresh(base_batch_norm="train").train()
    model(images())
    model.eval().save_pretrained(tmp_path)
    save_file({n: b for n, b in model.named_buffers() if ".smear_" not in n}, tmp_path / "beside.safetensors")
    again = load(tiny_resnet(), tmp_path).eval()
    with torch.no_grad():
        wanted = model(images())
        assert (again(images()) - wanted).abs().max() > 0.01
        again.load_state_dict(load_file(tmp_path / "beside.safetensors"), strict=False)
        assert torch.equal(again(images()), wanted)


def test_a_drifting_base_is_warned_of():
    for setting in ("train", "drift"):
        with pytest.warns(UserWarning, match=DRIFTS):
            fresh(base_batch_norm=setting)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fresh()
        fresh(tiny_t5(), base_batch_norm="train")  # has none
