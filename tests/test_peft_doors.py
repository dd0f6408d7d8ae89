"""PEFT's doors for one adapter: made, saved, loaded, injected, copied; what comes back is equal bit for bit."""

import copy
import io
import pickle

import pytest
import torch
from peft import (
    AutoPeftModel,
    AutoPeftModelForSeq2SeqLM,
    PeftConfig,
    PeftModel,
    PeftModelForSeq2SeqLM,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file
from torch import nn

from smear_peft import SmearConfig, SmearModel

from .adapters import SMALL, answer, same
from .models import images, perceptron, t5_batch, tiny_resnet, tiny_t5
from .routed import enliven, routed


@pytest.fixture
def saved(tmp_path):
    """A folder with a T5 adapter, and what the model that saved it answers."""
    model = routed()
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", answer(model)


@pytest.mark.parametrize("task_type", [None, "SEQ_2_SEQ_LM"])
def test_get_peft_model(task_type):
    model = routed(task_type=task_type)
    assert type(model) is (PeftModelForSeq2SeqLM if task_type else PeftModel)
    assert isinstance(model.base_model, SmearModel)
    assert (answer(model) - answer(tiny_t5())).abs().max() > 0.1
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {name for name, _ in model.named_parameters() if ".smear_" not in name}


def test_the_user_s_configuration_is_left_alone():
    for make in (get_peft_model, lambda model, config: inject_adapter_in_model(config, model)):
        config = SmearConfig(**SMALL)
        before = copy.deepcopy(config)
        make(tiny_t5(), config)
        assert config == before


def test_the_model_s_configuration_is_the_resolved_one():
    config = get_peft_model(tiny_t5(), SmearConfig(**SMALL)).peft_config["default"]
    assert (config.target_modules, config.train_layer_norms) == (["o", "wo"], True)
    assert get_peft_model(tiny_resnet(), SmearConfig()).peft_config["default"].target_modules == ["act2"]


@pytest.mark.parametrize("task_type", [None, "SEQ_2_SEQ_LM"])
@pytest.mark.parametrize("options", [{}, {"low_cpu_mem_usage": True}, {"is_trainable": True}])
@pytest.mark.parametrize("adapter_name", ["default", "other"])
def test_save_and_from_pretrained(tmp_path, task_type, options, adapter_name):
    model = routed(task_type=task_type)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_t5(), tmp_path, adapter_name=adapter_name, **options)
    same(answer(again), answer(model))
    assert type(again) is type(model)
    trainable = {name for name, p in again.named_parameters() if p.requires_grad}
    expected = {name for name, _ in again.named_parameters() if f".{adapter_name}." in name}
    assert trainable == (expected if options.get("is_trainable") else set())
    assert not any(p.is_meta for p in again.parameters())


def test_the_file_holds_the_adapter_alone_under_no_adapter_s_name(saved):
    tensors = load_file(saved[0] / "adapter_model.safetensors")
    assert len(tensors) == 10 * 9 + 12
    assert all(".smear_block." in name or ".smear_norm." in name for name in tensors)
    assert not any("default" in name for name in tensors)


def test_peft_config_from_pretrained(saved):
    config = PeftConfig.from_pretrained(saved[0])
    assert isinstance(config, SmearConfig)
    assert (config.num_experts, config.bottleneck_dim, config.inference_mode) == (3, 4, True)


def test_the_auto_classes(tmp_path):
    tiny_t5().save_pretrained(tmp_path / "base")
    from transformers import AutoModelForSeq2SeqLM, T5ForConditionalGeneration

    for task_type, auto in ((None, AutoPeftModel), ("SEQ_2_SEQ_LM", AutoPeftModelForSeq2SeqLM)):
        base = T5ForConditionalGeneration.from_pretrained(tmp_path / "base")
        model = routed(base, task_type=task_type)
        folder = tmp_path / str(task_type)
        model.save_pretrained(folder)
        same(answer(auto.from_pretrained(folder)), answer(model))
        same(answer(AutoModelForSeq2SeqLM.from_pretrained(folder)), answer(model))


def test_load_adapter(saved):
    folder, wanted = saved
    model = get_peft_model(tiny_t5(), SmearConfig(**SMALL))
    fresh = answer(model)
    for options in ({}, {"low_cpu_mem_usage": True}):
        name = f"loaded_{len(options)}"
        model.load_adapter(folder, name, **options)
        same(answer(model), fresh)
        model.set_adapter(name)
        same(answer(model), wanted)
        model.set_adapter("default")


def test_inject_adapter_in_model(saved):
    folder, wanted = saved
    tensors = load_file(folder / "adapter_model.safetensors")
    short = {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}
    for low in (False, True):
        for state_dict in (None, short):
            model = inject_adapter_in_model(
                SmearConfig(**SMALL), tiny_t5(), low_cpu_mem_usage=low, state_dict=state_dict
            )
            assert any(p.is_meta for p in model.parameters()) is low
            result = set_peft_model_state_dict(model, tensors, low_cpu_mem_usage=low)
            assert result.unexpected_keys == []
            same(answer(model.eval()), wanted)
            same(get_peft_model_state_dict(model)["decoder.final_layer_norm.smear_norm.weight"],
                 tensors["base_model.model.decoder.final_layer_norm.smear_norm.weight"])  # fmt: skip


@pytest.mark.filterwarnings("ignore:While injecting:RuntimeWarning")
@pytest.mark.parametrize(
    ("saved_with", "injected_with"),
    [
        ({"target_modules": ["wo"], "train_layer_norms": False}, {}),
        ({}, {"target_modules": ["wo"], "train_layer_norms": False}),
        ({"exclude_modules": ["wo"]}, {"exclude_modules": ["o"], "layers_to_transform": [0]}),
    ],
)
def test_inject_follows_the_state_dict_where_the_configuration_says_otherwise(saved_with, injected_with):
    model = routed(**saved_with)
    tensors = {k.removeprefix("base_model.model."): v for k, v in get_peft_model_state_dict(model).items()}
    other = inject_adapter_in_model(SmearConfig(**SMALL, **injected_with), tiny_t5(), state_dict=tensors)
    assert set_peft_model_state_dict(other, tensors).unexpected_keys == []
    same(answer(other.eval()), answer(model))
    assert get_peft_model_state_dict(other).keys() == tensors.keys()


def test_copies_of_a_model_are_models_of_their_own():
    model = routed(routing="tag")
    tags = torch.tensor([0, 1, 2])
    wanted = answer(model, routing_tags=tags)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(buffer, weights_only=False),
    ]
    for other in copies:
        same(answer(other, routing_tags=tags), wanted)
        enliven(other, seed=5)
        assert (answer(other, routing_tags=tags) - wanted).abs().max() > 1e-3
        assert other.generate(**t5_batch(), routing_tags=tags, max_new_tokens=2).shape[0] == 3
    same(answer(model, routing_tags=tags), wanted)


def test_the_head_of_a_resnet_trains_and_is_saved(tmp_path):
    model = get_peft_model(tiny_resnet(), SmearConfig(**SMALL, modules_to_save=["fc"]))
    head = model.base_model.model.fc
    assert all(p.requires_grad for p in head.modules_to_save.parameters())
    nn.init.normal_(head.modules_to_save["default"].weight)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_resnet(), tmp_path).eval()
    with torch.no_grad():
        same(again(images()), model.eval()(images()))
        assert (again(images()) - tiny_resnet()(images())).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_bases_of_other_types(tmp_path, dtype):
    model = routed(tiny_t5().to(dtype))
    assert answer(model).dtype == dtype
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    assert {p.dtype for n, p in model.named_parameters() if ".smear_block." in n} == {kept}
    model.save_pretrained(tmp_path)
    same(answer(PeftModel.from_pretrained(tiny_t5().to(dtype), tmp_path)), answer(model))
    narrow = get_peft_model(tiny_t5().to(dtype), SmearConfig(**SMALL), autocast_adapter_dtype=False)
    assert {p.dtype for n, p in narrow.named_parameters() if ".smear_block." in n} == {dtype}


def test_float16_t5_warns_of_its_overflow():
    with pytest.warns(UserWarning, match="bfloat16"):
        get_peft_model(tiny_t5().half(), SmearConfig(**SMALL))


@pytest.mark.parametrize(
    ("make", "fields"), [(tiny_t5, {}), (tiny_resnet, {}), (perceptron, {"target_modules": ["act"]})]
)
def test_an_adapter_added_after_a_cast_has_the_base_s_type(make, fields):
    model = get_peft_model(make(), SmearConfig(**SMALL, **fields)).to(torch.float64)
    model.add_adapter("later", SmearConfig(**SMALL, **fields))
    late = {p.dtype for name, p in model.named_parameters() if ".later." in name}
    assert late == {torch.float64}
