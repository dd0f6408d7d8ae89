"""What PEFT offers its own methods, where a method from outside could stumble. `peft_suite` runs PEFT's own tests."""

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn

from smear_peft import SmearConfig, SmearLayer, list_sites

from .models import perceptron, t5_batch, tiny_t5
from .routed import close, enliven, routed

BERT = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_all_linear_is_every_linear_layer_but_the_head():
    names = {site.name for site in list_sites(tiny_t5(), SmearConfig(target_modules="all-linear", bottleneck_dim=4))}
    linear = {name for name, module in tiny_t5().named_modules() if isinstance(module, nn.Linear)}
    assert names == linear - {"lm_head"}


def test_all_linear_leaves_a_classifier_out():
    base = transformers.BertForSequenceClassification(transformers.BertConfig(**BERT))
    model = get_peft_model(base, SmearConfig(target_modules="all-linear", bottleneck_dim=4, task_type="SEQ_CLS"))
    wrapped = {name for name, module in model.named_modules() if isinstance(module, SmearLayer)}
    assert len(wrapped) == 7
    assert not any("classifier" in name for name in wrapped)


def test_all_linear_for_a_second_adapter_means_the_same():
    config = SmearConfig(target_modules="all-linear", bottleneck_dim=4, train_layer_norms=False)
    model = get_peft_model(tiny_t5(), config)
    model.add_adapter("second", config)
    layers = [module for module in model.modules() if isinstance(module, SmearLayer)]
    assert layers
    assert all(set(layer.smear_block) == {"default", "second"} for layer in layers)


@pytest.mark.parametrize(
    ("task_type", "head", "name"),
    [
        ("TOKEN_CLS", "BertForTokenClassification", "classifier"),
        ("QUESTION_ANS", "BertForQuestionAnswering", "qa_outputs"),
        ("SEQ_CLS", "BertForSequenceClassification", "classifier"),
    ],
)
@pytest.mark.feature("transformers' `add_adapter`, `load_adapter`", "any other")
def test_the_head_of_a_task_trains_and_is_saved(tmp_path, task_type, head, name):
    def base():
        torch.manual_seed(0)
        return getattr(transformers, head)(transformers.BertConfig(**BERT)).eval()

    config = SmearConfig(target_modules=["query"], bottleneck_dim=4, task_type=task_type)
    model = enliven(get_peft_model(base(), config)).eval()
    assert any(f"{name}.modules_to_save.default" in p for p in trainable(model))
    with torch.no_grad():
        model.base_model.model.get_submodule(name).modules_to_save["default"].weight.mul_(-3)
    model.save_pretrained(tmp_path)
    ids = torch.randint(0, 64, (2, 5))
    close(PeftModel.from_pretrained(base(), tmp_path)(input_ids=ids)[0], model(input_ids=ids)[0])
    plain = base()
    plain.load_adapter(str(tmp_path))
    close(plain(input_ids=ids)[0], model(input_ids=ids)[0])


class Normed(nn.Module):
    """A model with a final layer that is called like a part of our blocks."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x):
        return self.norm(self.linear(x))


def test_modules_to_save_does_not_reach_into_the_blocks(tmp_path):
    torch.manual_seed(0)
    base = Normed()
    config = SmearConfig(target_modules=["linear"], bottleneck_dim=4, modules_to_save=["norm"])
    plain = get_peft_model(Normed(), SmearConfig(target_modules=["linear"], bottleneck_dim=4))
    model = get_peft_model(base, config)
    ours = {name for name in trainable(model) if ".smear_block." in name}
    assert ours == trainable(plain)
    assert trainable(model) - ours == {f"base_model.model.norm.modules_to_save.default.{p}" for p in ("weight", "bias")}
    model(torch.randn(8, 4))
    enliven(model).eval().save_pretrained(tmp_path)
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(Normed(), tmp_path).eval()
    x = torch.randn(3, 4)
    close(again(x), model(x))


@pytest.mark.parametrize(("conv", "size"), [(nn.Conv1d, (9,)), (nn.Conv2d, (5, 4)), (nn.Conv3d, (3, 4, 5))])
@pytest.mark.parametrize("routing", ["smear", "soft_moe", "top_k"])
def test_feature_maps_of_any_rank(conv, size, routing):
    base = nn.Sequential(conv(3, 8, 1), nn.Flatten(), nn.LazyLinear(2))
    x = torch.randn(4, 3, *size)
    base(x)
    model = routed(base, target_modules=["0"], routing=routing)
    features = model.base_model.model[0](x)
    assert features.shape == (4, 8, *size)
    with model.disable_adapter():
        assert not torch.allclose(features, model.base_model.model[0](x))
    close(model(x)[1:3], model(x[1:3]))


@pytest.mark.skipif(torch.__version__.startswith("2.9."), reason="Dynamo of torch 2.9 fails within itself on T5")
def test_adapters_go_into_a_compiled_model():
    batch = t5_batch()
    wanted = routed(tiny_t5())(**batch).logits
    model = torch.compile(tiny_t5(), backend="eager")
    inject_adapter_in_model(SmearConfig(num_experts=3, bottleneck_dim=4), model)
    assert {site.name for site in list_sites(model)} == {site.name for site in list_sites(tiny_t5())}
    close(enliven(model).eval()(**batch).logits, wanted)


def test_layers_pattern_needs_layers_to_transform():
    with pytest.raises(ValueError, match="`layers_to_transform` must also be specified"):
        SmearConfig(target_modules=["o"], layers_pattern="block")
    with pytest.raises(ValueError, match="cannot be used when `target_modules` is a str"):
        SmearConfig(target_modules=".*o", layers_to_transform=[0])


def test_which_parameters_train_follows_the_active_adapters():
    config = {"num_experts": 2, "bottleneck_dim": 4}
    model = get_peft_model(perceptron(), SmearConfig(target_modules=["first"], **config))
    model.add_adapter("other", SmearConfig(target_modules=["first", "second"], **config))
    model.add_adapter("frozen", SmearConfig(target_modules=["second"], inference_mode=True, **config))
    of = {name: {p for p, _ in model.named_parameters() if f".smear_block.{name}." in p} for name in model.peft_config}
    assert trainable(model) == of["default"]
    model.set_adapter("other")
    assert trainable(model) == of["other"]
    model.base_model.set_adapter(["default", "other"])
    assert trainable(model) == of["default"] | of["other"]
    model.set_adapter("frozen", inference_mode=True)
    assert trainable(model) == set()
    model.set_requires_grad(["default", "other"])
    assert trainable(model) == of["default"] | of["other"]
    model.set_requires_grad("other", requires_grad=False)
    assert trainable(model) == of["default"]


def test_a_tensor_that_the_file_misses_is_named(tmp_path):
    model = routed(perceptron(), target_modules=["first"])
    missing = "base_model.model.first.smear_block.default.expert.up.weight"
    rest = {name: tensor for name, tensor in model.state_dict().items() if name != missing}
    model.save_pretrained(tmp_path, state_dict=rest)
    with pytest.warns(UserWarning, match=missing.replace(".", r"\.")):
        PeftModel.from_pretrained(perceptron(), tmp_path)


def test_injecting_by_tensors_warns_where_the_configuration_says_otherwise():
    model = routed(perceptron(), target_modules=["first", "second"])
    tensors = {name.removeprefix("base_model.model."): t for name, t in model.state_dict().items() if "smear_" in name}
    config = SmearConfig(num_experts=3, bottleneck_dim=4, target_modules=["first"])
    with pytest.warns(RuntimeWarning, match=r"additional target modules: \['second'\]"):
        injected = inject_adapter_in_model(config, perceptron(), state_dict=tensors)
    assert isinstance(injected.second, SmearLayer)
