"""Bases with quantised weights: the blocks keep a float dtype of their own, train, and reload equal.

As users make them: `from_pretrained(..., quantization_config=...)`. These are torchao's and bitsandbytes' own kernels,
on the CPU as on a GPU.
"""

import copy
import logging
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, T5ForConditionalGeneration, TorchAoConfig

from smear_peft import SmearConfig, SmearLayer, list_sites, load

from . import models
from .adapters import SMALL, same
from .models import perceptron, t5_batch, tiny_t5
from .routed import close, enliven, routed

pytestmark = pytest.mark.usefixtures("device")

KINDS = ["torchao int8", "torchao int4", "bitsandbytes 8 bit", "bitsandbytes 4 bit"]
TORCHAO, BITS = KINDS[:2], KINDS[2:]
SIZES = {"d_model": 64, "d_ff": 64, "d_kv": 16}  # bitsandbytes quantises 64 weights at a time


def torchao_settings(kind: str):
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    if kind == "torchao int8":
        return quantization.Int8WeightOnlyConfig()
    # Int4WeightOnlyConfig has kernels for GPUs alone; this is torchao's int4 that runs everywhere.
    return quantization.IntxWeightOnlyConfig(torch.int4, quantization.PerGroup(32))


def settings_of(kind: str, dtype: torch.dtype):
    if kind in TORCHAO:
        return TorchAoConfig(torchao_settings(kind))
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    if kind == "bitsandbytes 8 bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype)


def quantised(kind: str, folder: Path, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """The tiny T5, its linear layers quantised but for the head."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # its 8 bit kernel says at every call that it casts
    settings = settings_of(kind, dtype)
    if not (folder / "config.json").exists():
        tiny_t5(**SIZES).save_pretrained(folder)
    place = {"quantization_config": settings, "dtype": dtype, "device_map": {"": models.DEVICE}}
    return T5ForConditionalGeneration.from_pretrained(folder, **place).eval()


def train(model: nn.Module, steps: int = 4) -> list[float]:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model.train()(**t5_batch()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(**t5_batch()).logits


@pytest.mark.parametrize("in_float32", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_have_a_float_dtype_of_their_own(kind, in_float32, tmp_path):
    base = quantised(kind, tmp_path)
    linear = base.encoder.block[1].layer[0].SelfAttention.o
    assert type(linear.weight) is not nn.Parameter
    before = linear.weight
    model = get_peft_model(base, SmearConfig(**SMALL), autocast_adapter_dtype=in_float32)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, SmearLayer)}
    assert {site.width for site in list_sites(model)} == {64}
    assert len(layers) == 10
    for name, layer in layers.items():
        kept = torch.float32 if in_float32 else torch.bfloat16
        parameters = dict(layer.smear_block.named_parameters())
        assert {p.dtype for part, p in parameters.items() if "expert" in part} == {kept}, name
        assert {p.device.type for p in parameters.values()} == {models.DEVICE.type}
    assert base.encoder.block[1].layer[0].SelfAttention.o.base_layer.weight is before
    assert logits(model).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_adapter_takes_the_type_of_the_base_and_not_of_the_first(kind, tmp_path):
    model = get_peft_model(quantised(kind, tmp_path), SmearConfig(**SMALL))
    model.add_adapter("second", SmearConfig(**SMALL, train_layer_norms=False), autocast_adapter_dtype=False)
    layer = model.get_base_model().encoder.block[1].layer[0].SelfAttention.o
    assert layer.smear_block["default"].expert.up.weight.dtype == torch.float32
    assert layer.smear_block["second"].expert.up.weight.dtype == torch.bfloat16


@pytest.mark.feature("base quantised by torchao, int8 and int4", "T5")
@pytest.mark.parametrize("kind", TORCHAO)
def test_gradients_are_those_of_the_same_weights_in_float32(kind, tmp_path):
    """Of the numbers that the quantised weights stand for: gradients pass through them to the blocks below."""
    base = quantised(kind, tmp_path, torch.float32)
    plain = tiny_t5(**SIZES)
    plain.load_state_dict({n: getattr(t, "dequantize", t.clone)() for n, t in base.state_dict().items()}, strict=False)
    assert not torch.equal(logits(plain), logits(tiny_t5(**SIZES)))
    found = []
    for model in (routed(base, expert_dropout=0.0), routed(plain, expert_dropout=0.0)):
        loss = model.train()(**t5_batch()).loss
        loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None} | {"loss": loss})
    assert found[0].keys() == found[1].keys()
    assert len(found[0]) > 60
    for name, value in found[0].items():
        close(value, found[1][name], 1e-4)


@pytest.mark.parametrize("kind", [
    *(pytest.param(k, marks=pytest.mark.feature("base quantised by torchao, int8 and int4", "T5")) for k in TORCHAO),
    *(pytest.param(k, marks=pytest.mark.feature("base quantised by bitsandbytes, 8 and 4 bit", "T5")) for k in BITS),
])  # fmt: skip
def test_trains_saves_and_reloads_equal(kind, tmp_path):
    model = get_peft_model(quantised(kind, tmp_path / "base"), SmearConfig(**SMALL, expert_dropout=0.0))
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    before = {name: copy.deepcopy(p) for name, p in frozen.items()}
    losses = train(model)
    assert losses[-1] < losses[0]
    for name, p in frozen.items():
        assert torch.equal(values(p), values(before[name])), name
    wanted = logits(model)
    source = {name: value for name, value in t5_batch().items() if name != "labels"}
    tokens = model.generate(**source, max_new_tokens=4)
    model.save_pretrained(tmp_path / "adapter")
    for again in (
        PeftModel.from_pretrained(quantised(kind, tmp_path / "base"), tmp_path / "adapter"),
        load(quantised(kind, tmp_path / "base"), tmp_path / "adapter"),
    ):
        same(logits(again), wanted)
        assert torch.equal(again.generate(**source, max_new_tokens=4), tokens)
    on_floats = load(tiny_t5(**SIZES).bfloat16(), tmp_path / "adapter")
    assert torch.isfinite(logits(on_floats)).all()


def values(p: Tensor) -> Tensor:
    return p.dequantize() if hasattr(p, "dequantize") and p.is_floating_point() and type(p) is not nn.Parameter else p


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_comes_back(kind, tmp_path):
    base = quantised(kind, tmp_path)
    wanted = logits(base)
    model = routed(base)
    assert not torch.equal(logits(model), wanted)
    with model.disable_adapter():
        same(logits(model), wanted)
    same(logits(model.unload()), wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_prepared_for_training_by_peft_with_checkpoints(kind, tmp_path):
    """What PEFT's pages tell users to call first; it switches gradient checkpointing on."""
    base = prepare_model_for_kbit_training(
        quantised(kind, tmp_path, torch.float32), gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    model = routed(base, expert_dropout=0.0)
    assert model.get_base_model().is_gradient_checkpointing
    found = []
    for on in (True, False):
        if not on:
            model.gradient_checkpointing_disable()
        model.train()(**t5_batch()).loss.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        close(value, found[1][name], 1e-4)


@pytest.mark.feature("base quantised by torchao, int8 and int4", "any other")
@pytest.mark.parametrize("kind", TORCHAO)
def test_any_other_model(kind, tmp_path):
    settings = torchao_settings(kind)

    def base() -> nn.Module:
        from torchao.quantization import quantize_

        model = perceptron(inputs=32, width=64, outputs=32)
        quantize_(model, settings)
        return model

    x = torch.randn(5, 32, device=models.DEVICE)
    model = enliven(get_peft_model(base(), SmearConfig(**SMALL, target_modules=["first", "act"], expert_dropout=0.0)))
    model.train()(x).square().sum().backward()
    assert all(p.grad.abs().max() > 0 for name, p in model.named_parameters() if "expert.up" in name)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        same(load(base(), tmp_path).eval()(x), model.eval()(x))
