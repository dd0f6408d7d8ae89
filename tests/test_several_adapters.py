"""PEFT's doors for several adapters, and the way out: switching, disabling, deleting, unloading."""

import pytest
import torch
from peft import PeftModel, get_layer_status, get_model_status, get_peft_model
from torch import nn

from smear_peft import SmearConfig, SmearLayer

from .adapters import SMALL, answer, same
from .models import images, perceptron, tiny_resnet, tiny_t5
from .routed import enliven, routed


@pytest.mark.feature("several adapters: switch, disable, delete", "T5")
def test_adding_switching_disabling_and_deleting():
    model = routed()
    bare, first = answer(tiny_t5()), answer(model)
    model.add_adapter("second", SmearConfig(**{**SMALL, "num_experts": 2}))
    same(answer(model), first)
    for layer in (m for m in model.modules() if isinstance(m, SmearLayer)):
        nn.init.normal_(layer.block_state("second")["expert.up.weight"])
    model.set_adapter("second")
    second = answer(model)
    assert (second - first).abs().max() > 0.1
    with model.disable_adapter():
        same(answer(model), bare)
    same(answer(model), second)
    model.set_adapter("default")
    same(answer(model), first)
    model.delete_adapter("second")
    same(answer(model), first)
    assert not any("second" in name for name in model.state_dict())
    model.add_adapter("second", SmearConfig(**SMALL))
    model.set_adapter("second")
    model.delete_adapter("default")
    assert not any(".default" in name for name in model.state_dict())


def test_saving_several_adapters_saves_each_whole(tmp_path):
    model = routed()
    first = answer(model)
    model.add_adapter("second", SmearConfig(routing="ensemble", **SMALL))
    model.save_pretrained(tmp_path)
    model.set_adapter("second")
    same(answer(PeftModel.from_pretrained(tiny_t5(), tmp_path)), first)
    same(answer(PeftModel.from_pretrained(tiny_t5(), tmp_path / "second")), answer(model))


@pytest.mark.parametrize("name", ["encoder", "expert", "router", "weight", "0", "layer_norm", "smear_block", "a.b", ""])
def test_names_that_would_lose_tensors_on_saving_are_refused(name):
    model = routed()
    before = answer(model)
    with pytest.raises(ValueError, match=f"called '{name}'"):
        get_peft_model(tiny_t5(), SmearConfig(**SMALL), adapter_name=name)
    with pytest.raises(ValueError, match=f"called '{name}'"):
        model.add_adapter(name, SmearConfig(**SMALL))
    same(answer(model), before)
    assert list(model.peft_config) == ["default"]


def hooks_of(model):
    tables = ("_forward_pre_hooks", "_forward_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs",
              "_forward_hooks_always_called", "_backward_hooks")  # fmt: skip
    return [(name, table) for name, module in model.named_modules() for table in tables if getattr(module, table)]


@pytest.mark.parametrize(
    ("make", "call", "fields"),
    [
        (tiny_t5, answer, {}),
        (tiny_t5, answer, {"modules_to_save": ["lm_head"]}),
        (tiny_resnet, lambda m: m(images()).detach(), {"modules_to_save": ["fc"]}),
        (perceptron, lambda m: m(torch.ones(2, 6)).detach(), {"target_modules": ["first", "act"]}),
    ],
)
@pytest.mark.feature("`unload` gives the base back", "T5", "ResNet", "any other")
def test_unload_gives_the_base_back(make, call, fields):
    base = make()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    attributes = {name: set(vars(module)) for name, module in base.named_modules()}
    answered = call(base)
    model = enliven(get_peft_model(base, SmearConfig(**SMALL, **fields)))
    model.train()
    call(model)
    model.eval()
    assert not torch.equal(call(model), answered)
    bare = model.unload()
    assert bare is base
    assert list(bare.state_dict()) == list(before)
    for name, tensor in bare.state_dict().items():
        same(tensor, before[name])
    same(call(bare.eval()), answered)
    assert hooks_of(bare) == []
    left = {n: set(vars(m)) - attributes[n] - {"peft_config"} for n, m in bare.named_modules()}
    assert {name: extra for name, extra in left.items() if extra} == {}


def test_unload_keeps_a_trained_head_as_every_method_of_peft_does():
    model = get_peft_model(tiny_resnet(), SmearConfig(**SMALL, modules_to_save=["fc"]))
    with torch.no_grad():
        model.base_model.model.fc.modules_to_save["default"].bias.fill_(3.0)
    assert model.unload().fc.bias.tolist() == [3.0] * 5


def test_a_base_that_was_unloaded_takes_a_new_adapter():
    base = tiny_t5()
    first = routed(base)
    wanted = answer(first)
    again = routed(first.unload())
    same(answer(again), wanted)


def test_status():
    model = routed()
    model.add_adapter("second", SmearConfig(**SMALL, train_layer_norms=False))
    status = get_model_status(model)
    assert (status.adapter_model_type, status.peft_types) == ("SmearModel", {"default": "SMEAR", "second": "SMEAR"})
    assert (status.enabled, status.active_adapters, status.merged_adapters) == (True, ["default"], [])
    assert status.requires_grad == {"default": True, "second": False}
    assert status.num_adapter_layers == 10 + 12
    layers = {layer.name.removeprefix("model."): layer for layer in get_layer_status(model)}
    site = layers["encoder.block.0.layer.0.SelfAttention.o"]
    assert (site.module_type, site.available_adapters) == ("SmearLayer", ["default", "second"])
    assert layers["encoder.final_layer_norm"].available_adapters == ["default"]
    with model.disable_adapter():
        assert get_model_status(model).enabled is False


def test_merging_is_refused_and_changes_nothing():
    model = routed()
    model.add_adapter("second", SmearConfig(**SMALL, train_layer_norms=False))
    before = answer(model)
    merges = [
        model.merge_and_unload,
        model.merge_adapter,
        lambda: model.merge_and_unload(safe_merge=True),
        lambda: model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "both"),
        lambda: model.base_model.merge_adapter(["default"]),
    ]
    for merge in merges:
        with pytest.raises(ValueError, match=r"unload\(\)"):
            merge()
    same(answer(model), before)
    assert list(model.peft_config) == ["default", "second"]


def test_two_active_adapters_apply_one_after_another():
    model = get_peft_model(perceptron(), SmearConfig(**SMALL, target_modules=["first"]))
    model.add_adapter("later", SmearConfig(**SMALL, target_modules=["first"], norm="none"))
    enliven(model).eval()
    layer = model.base_model.model.first
    x = torch.randn(5, 6)
    after_one = {}
    for name in ("default", "later"):
        model.set_adapter(name)
        after_one[name] = layer(x)
    model.base_model.set_adapter(["default", "later"])
    both = layer(x)
    # The second block on what the first one gave: put that into the base layer, and ask for the second alone.
    model.set_adapter("later")
    base_layer, layer.base_layer = layer.base_layer, Constant(after_one["default"])
    same(layer(x), both)
    layer.base_layer = base_layer
    model.base_model.set_adapter(["later", "default"])
    assert (layer(x) - both).abs().max() > 1e-3


class Constant(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x):
        return self.value


def test_two_active_adapters_that_train_layer_norms_clash():
    model = routed()
    model.add_adapter("second", SmearConfig(**SMALL))
    model.add_adapter("third", SmearConfig(**SMALL, train_layer_norms=False))
    before = answer(model)
    with pytest.raises(ValueError, match=r"default, second.*train_layer_norms"):
        model.base_model.set_adapter(["default", "second"])
    same(answer(model), before)
    model.base_model.set_adapter(["third", "default"])
    assert answer(model).isfinite().all()
