"""`smear_peft.load`: what is saved comes back, from a folder or the Hub, and a failure leaves the base as it was."""

import shutil

import huggingface_hub
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from smear_peft import SmearConfig, SmearLayer, load

from .adapters import CONFIG, SMALL, UP, WEIGHTS, answer, edit_weights, portrait, refused
from .models import images, perceptron, tiny_resnet, tiny_t5
from .routed import enliven, routed

COMMIT = "c0ffee00" * 5


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A folder with the adapter of a T5, and what its model answers."""
    folder = tmp_path_factory.mktemp("original")
    model = routed()
    model.save_pretrained(folder)
    return folder, answer(model)


@pytest.fixture
def folder(original, tmp_path):
    """A copy of that folder, to break."""
    shutil.copytree(original[0], tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("options", [{}, {"low_cpu_mem_usage": True}, {"is_trainable": True}, {"adapter_name": "mine"}])
def test_load(original, options):
    model = load(tiny_t5(), original[0], **options)
    assert isinstance(model, PeftModel)
    assert torch.equal(answer(model), original[1])
    assert list(model.peft_config) == [options.get("adapter_name", "default")]
    assert any(p.requires_grad for p in model.parameters()) is options.get("is_trainable", False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_load_onto_other_types(tmp_path, dtype):
    model = routed(tiny_t5().to(dtype))
    model.save_pretrained(tmp_path)
    assert torch.equal(answer(load(tiny_t5().to(dtype), tmp_path)), answer(model))


def test_load_a_resnet_with_its_head(tmp_path):
    model = enliven(get_peft_model(tiny_resnet(), SmearConfig(**SMALL, modules_to_save=["fc", "layer4.0.bn2"])))
    model.train()(images())
    model.eval().save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(load(tiny_resnet(), tmp_path)(images()), model(images()))


@pytest.mark.parametrize(
    "fields",
    [{"routing": "soft_moe"}, {"train_layer_norms": False}, {"modules_to_save": ["final_layer_norm", "lm_head"]}],
)
def test_load_other_kinds_of_adapters(tmp_path, fields):
    model = routed(**fields)
    model.save_pretrained(tmp_path)
    assert torch.equal(answer(load(tiny_t5(), tmp_path)), answer(model))


def test_load_takes_the_embeddings_that_peft_adds(tmp_path):
    model = routed()
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    assert "base_model.model.shared.weight" in load_file(tmp_path / WEIGHTS)
    assert torch.equal(answer(load(tiny_t5(), tmp_path)), answer(model))


def test_a_peft_model_gains_one_more_adapter(original):
    model = get_peft_model(tiny_t5(), SmearConfig(**SMALL), adapter_name="first")
    fresh = answer(model)
    assert load(model, original[0], adapter_name="loaded") is model
    assert torch.equal(answer(model), fresh)
    model.set_adapter("loaded")
    assert torch.equal(answer(model), original[1])
    before = portrait(model)
    with pytest.raises(ValueError, match="'loaded'"):
        load(model, original[0], adapter_name="loaded")
    assert portrait(model) == before


def test_load_beside_another_method(original):
    model = get_peft_model(tiny_t5(), LoraConfig(target_modules=["q"]))
    with pytest.raises(ValueError, match=r"SMEAR|LORA|type"):
        load(model, original[0], adapter_name="loaded")
    assert list(model.peft_config) == ["default"]


def hub_cache(root, folder, subfolder=""):
    """The Hub's cache as it is after a download of `user/name`."""
    repo = root / "models--user--name"
    shutil.copytree(folder, repo / "snapshots" / COMMIT / subfolder)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    return root


def test_load_from_the_hub_s_cache(original, tmp_path):
    cache = hub_cache(tmp_path, original[0])
    # Offline, huggingface_hub 1.x does not find a commit in its own cache.
    by_commit = [] if huggingface_hub.__version__.startswith("1.") else [COMMIT]
    for revision in (None, "main", *by_commit):
        model = load(tiny_t5(), "user/name", revision=revision, cache_dir=cache)
        assert torch.equal(answer(model), original[1])


def test_subfolders(original, tmp_path):
    cache = hub_cache(tmp_path, original[0], "runs/best")
    model = load(tiny_t5(), "user/name", subfolder="runs/best", cache_dir=cache)
    assert torch.equal(answer(model), original[1])
    snapshot = cache / "models--user--name" / "snapshots" / COMMIT
    assert torch.equal(answer(load(tiny_t5(), snapshot, subfolder="runs/best")), original[1])
    with pytest.raises(FileNotFoundError, match=r"adapter_config.json"):
        load(tiny_t5(), "user/name", subfolder="runs/worst", cache_dir=cache)


def test_what_is_not_there(tmp_path, folder):
    refused(tmp_path / "nowhere", FileNotFoundError, "nowhere")
    refused("user/name", FileNotFoundError, "user/name.*Hub")
    refused(folder / CONFIG, FileNotFoundError, "neither a folder")
    (folder / WEIGHTS).unlink()
    refused(folder, FileNotFoundError, "adapter_model.safetensors.*adapter_config.json")
    (folder / CONFIG).unlink()
    refused(folder, FileNotFoundError, "has no adapter_config.json")


class Stubborn(nn.Module):
    """A base that refuses half-way: its last layer cannot be replaced."""

    def __init__(self):
        super().__init__()
        self.net = perceptron()
        self.net.__class__ = type("Fixed", (type(self.net),), {"__setattr__": self.refuse})

    @staticmethod
    def refuse(module, name, value):
        if name == "second" and isinstance(value, SmearLayer):
            raise RuntimeError("fixed")
        nn.Module.__setattr__(module, name, value)

    def forward(self, x):
        return self.net(x)


def test_a_base_that_fails_half_way_is_put_back(tmp_path):
    class Easy(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = perceptron()

    get_peft_model(Easy(), SmearConfig(**SMALL, target_modules=["first", "second"])).save_pretrained(tmp_path)
    base = Stubborn().train()
    handle = base.net.first.register_forward_hook(lambda *_: None)
    refused(tmp_path, RuntimeError, "fixed", base=base)
    assert type(base.net.first) is nn.Linear
    handle.remove()
    assert not base.net.first._forward_hooks


@pytest.mark.parametrize("name", ["encoder", "a.b", ""])
def test_adapter_names_that_cannot_be(original, name):
    base = tiny_t5()
    before = portrait(base)
    with pytest.raises(ValueError, match="called"):
        load(base, original[0], adapter_name=name)
    assert portrait(base) == before


@pytest.mark.parametrize("low", [False, True])
def test_peft_s_own_door_names_what_it_can_see(folder, low):
    def through(change):
        tensors = load_file(folder / WEIGHTS)
        edit_weights(folder, change)
        try:
            return PeftModel.from_pretrained(tiny_t5(), folder, low_cpu_mem_usage=low)
        finally:
            save_file(tensors, folder / WEIGHTS)

    with pytest.raises(ValueError, match=f"{UP}.*NaN"):
        through(lambda t: t[UP].fill_(float("nan")))
    with pytest.raises(ValueError, match=f"{UP}.*int64"):
        through(lambda t: t.update({UP: t[UP].long()}))
    with pytest.raises((RuntimeError, ValueError), match=r"expert.up.weight"):
        through(lambda t: t.update({UP: t[UP][:2]}))
    with pytest.warns(UserWarning, match="encoder.block.0.layer.0.SelfAttention.o.smear_block.extra"):
        through(lambda t: t.update({UP.replace("expert.up.weight", "extra"): t[UP].clone()}))
    with pytest.warns(UserWarning, match="expert.up.weight"):
        through(lambda t: t.pop(UP))
