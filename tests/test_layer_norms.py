"""`train_layer_norms`: copies of the base's layer norms, in every kind of model that has any."""

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import nn

from smear_peft import SmearConfig, list_sites, load
from smear_peft.layer import SmearNorm

from .models import images, perceptron, t5_batch, tiny_resnet, tiny_t5
from .routed import close, enliven, routed

SHAPE = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TEXT = {"input_ids": torch.tensor([[5, 6, 7, 8], [9, 3, 4, 2]]), "labels": torch.tensor([[-100, -100, 7, 8]] * 2)}


def bert():
    return transformers.BertForMaskedLM(transformers.BertConfig(**SHAPE)), TEXT


def llama():
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE, num_key_value_heads=2)), TEXT


def vit():
    shape = {name: value for name, value in SHAPE.items() if name != "vocab_size"}
    config = transformers.ViTConfig(**shape, image_size=32, patch_size=8)
    return transformers.ViTForImageClassification(config), {"pixel_values": images(), "labels": torch.tensor([0, 1, 1])}


def make(kind):
    torch.manual_seed(0)
    base, batch = kind()
    return base.eval(), batch


@pytest.mark.parametrize(("kind", "count"), [(bert, 1 + 2 * 2 + 1), (llama, 2 * 2 + 1), (vit, 2 * 2 + 1)])
def test_norms_train_are_saved_and_come_off_again(kind, count, tmp_path):
    base, batch = make(kind)
    expected = base(**batch).logits.detach()
    model = enliven(get_peft_model(base, SmearConfig(num_experts=2, bottleneck_dim=4, train_layer_norms=True)))
    norms = {name: module for name, module in model.named_modules() if isinstance(module, SmearNorm)}
    assert len(norms) == count
    model(**batch).loss.backward()
    weights = [norm.smear_norm["default"].weight for norm in norms.values()]
    assert all(weight.requires_grad and weight.grad.abs().max() > 0 for weight in weights)
    before = model.eval()(**batch).logits.detach()
    with torch.no_grad():
        for weight in weights:
            weight.mul_(1.5)
    trained = model(**batch).logits.detach()
    assert not torch.allclose(trained, before)
    model.save_pretrained(tmp_path)
    close(PeftModel.from_pretrained(make(kind)[0], tmp_path).eval()(**batch).logits, trained)
    close(load(make(kind)[0], tmp_path).eval()(**batch).logits, trained)
    with model.disable_adapter():
        assert torch.equal(model(**batch).logits, expected)
    assert torch.equal(model.unload()(**batch).logits, expected)


@pytest.mark.parametrize("kind", [bert, llama, vit])
def test_the_default_leaves_them_alone_outside_of_t5(kind):
    model = get_peft_model(make(kind)[0], SmearConfig(num_experts=2, bottleneck_dim=4))
    assert model.peft_config["default"].train_layer_norms is False
    assert not any(isinstance(module, SmearNorm) for module in model.modules())


def test_on_t5_true_is_the_default():
    def wrapped(**fields):
        return [name for name, module in routed(**fields).named_modules() if isinstance(module, SmearNorm)]

    assert wrapped(train_layer_norms=True) == wrapped() != []


@pytest.mark.parametrize("base", [tiny_resnet, perceptron])
def test_true_without_any_layer_norm_is_refused(base):
    base, config = base(), SmearConfig(target_modules=r".*(act2|first)", bottleneck_dim=4, train_layer_norms=True)
    with pytest.raises(ValueError, match="train_layer_norms=True, but this model has no layer norms"):
        get_peft_model(base, config)
    assert not hasattr(base, "peft_config")


def test_norms_without_weights_and_other_norms_stay_as_they_are():
    base = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4, elementwise_affine=False), nn.RMSNorm(4), nn.BatchNorm1d(4))
    model = get_peft_model(base, SmearConfig(target_modules=["0"], bottleneck_dim=2, train_layer_norms=True))
    wrapped = [name for name, module in model.base_model.model.named_children() if isinstance(module, SmearNorm)]
    assert wrapped == ["2"]


@pytest.mark.parametrize("target", ["layer_norm", "final_layer_norm"])
def test_a_norm_that_is_a_site_is_no_copy_as_well(target, tmp_path):
    config = SmearConfig(target_modules=[target], num_experts=2, bottleneck_dim=4, train_layer_norms=True)
    model = enliven(get_peft_model(tiny_t5(), config)).eval()
    sites = {site.name for site in list_sites(tiny_t5(), config)}
    copies = {name.removeprefix("base_model.model.") for name, m in model.named_modules() if isinstance(m, SmearNorm)}
    assert sites
    assert not sites & copies
    model.save_pretrained(tmp_path)
    close(load(tiny_t5(), tmp_path).eval()(**t5_batch()).logits, model(**t5_batch()).logits)
