"""Broken adapter files, and files for another base: refused by name before anything is touched."""

import os
import shutil

import pytest
import torch

from smear_peft import load

from .adapters import CONFIG, UP, WEIGHTS, answer, edit_config, edit_weights, refused
from .models import perceptron, tiny_resnet, tiny_t5
from .mutations import Trap
from .routed import routed


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


def test_nothing_pickled_is_read(folder, tmp_path, original):
    torch.save({"x": Trap(tmp_path / "sprung")}, folder / "adapter_model.bin")
    assert torch.equal(answer(load(tiny_t5(), folder)), original[1])
    (folder / WEIGHTS).unlink()
    refused(folder, ValueError, "adapter_model.bin.*safe_serialization")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("text", "named"),
    [("{", "no readable JSON"), ("", "no readable JSON"), ("[" * 100_000, "no readable JSON"), ("[]", "JSON list"),
     ("null", "NoneType"), ("\x00", "no readable JSON"), ("{}", "peft_type is None"), (" " * 2**25, "bytes")],
)  # fmt: skip
def test_broken_configurations(folder, text, named):
    (folder / CONFIG).write_text(text)
    refused(folder, ValueError, f"(?s)adapter_config.json.*{named}")


@pytest.mark.parametrize(
    ("fields", "error", "named"),
    [
        ({"peft_type": "LORA"}, ValueError, "'LORA'.*SMEAR"),
        ({"peft_type": ["SMEAR"]}, ValueError, "peft_type"),
        ({"num_expert": 3}, ValueError, r"num_expert .*num_experts\?"),
        ({"num_experts": "3"}, TypeError, "num_experts.*'3'"),
        ({"num_experts": 10**9}, ValueError, "num_experts=1000000000.*4096"),
        ({"num_experts": 4096, "bottleneck_dim": 2**20}, ValueError, r"expert.*\(3, .*\(4096, "),
        ({"num_experts": 2}, ValueError, r"has shape \(3,.*call for \(2,"),
        ({"routing": "smeer"}, ValueError, "routing='smeer'"),
        ({"routing": "single"}, ValueError, "router"),
        ({"routing": "reinforce"}, ValueError, "missing .*baseline"),
        ({"format_version": 3, "new_field": 1}, ValueError, "format_version=3.*newer"),
        ({"expert_init_std": float("nan")}, ValueError, "expert_init_std=nan"),
        ({"task_type": "DREAM"}, ValueError, "DREAM"),
        ({"inference_mode": "yes"}, TypeError, "inference_mode"),
        ({"target_modules": ["oo"]}, ValueError, "oo.*no module"),
        ({"target_modules": "("}, ValueError, "target_modules"),
        ({"target_modules": ["o"]}, ValueError, "have no place .*wo"),
        ({"train_layer_norms": False}, ValueError, "12 have no place .*smear_norm"),
        ({"modules_to_save": ["lm_head"]}, ValueError, "1 are missing .*lm_head"),
        ({"reduction_factor": 10**6, "bottleneck_dim": None}, ValueError, "reduction_factor"),
    ],
)
def test_configurations_that_mean_nothing_or_something_else(folder, fields, error, named):
    edit_config(folder, **fields)
    refused(folder, error, f"adapter_.*{named}")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop(UP), f"1 are missing .{UP}"),
        (lambda t: t.update({"more": torch.ones(1)}), "1 have no place .more"),
        (lambda t: t.update({UP + "s": t.pop(UP)}), f"missing .{UP}.*no place .{UP}s"),
        (lambda t: t.update({UP: t[UP].mT}), rf"{UP} has shape \(3, 32, 4\).*\(3, 4, 32\)"),
        (lambda t: t.update({UP: t[UP][:2]}), rf"{UP} has shape \(2, 4, 32\)"),
        (lambda t: t.update({UP: t[UP].int()}), f"{UP} holds I32"),
        (lambda t: t.update({UP: t[UP].bool()}), f"{UP} holds BOOL"),
        (lambda t: t.update({UP: t[UP].to(torch.float8_e4m3fn)}), f"{UP} holds F8"),
        (lambda t: t[UP][1, 2].fill_(float("nan")), f"{UP} holds NaN or infinity in 32 of 384"),
        (lambda t: t[UP][0, 0, 0].fill_(float("-inf")), f"{UP} holds NaN or infinity in 1 of 384"),
        (lambda t: t.update({UP: t[UP].double() * 1e300}), f"{UP} holds NaN or infinity"),
        (lambda t: t.clear(), "102 are missing"),
    ],
)
def test_tensors_that_do_not_fit(folder, change, named):
    edit_weights(folder, change)
    refused(folder, ValueError, f"adapter_model.safetensors.*{named}")


def test_buffers_that_make_no_sense(tmp_path):
    routed(tiny_resnet()).save_pretrained(tmp_path)
    block = "base_model.model.layer1.0.act2.smear_block.norm."
    saved = (tmp_path / WEIGHTS).read_bytes()
    for name, value, named in [
        ("running_var", -torch.ones(8), "negative"),
        ("num_batches_tracked", torch.tensor(1.5), "holds F32; possible: I64"),
        ("num_batches_tracked", torch.tensor([1]), "has shape"),
    ]:
        edit_weights(tmp_path, lambda t, n=name, v=value: t.update({block + n: v}))
        refused(tmp_path, ValueError, named, base=tiny_resnet())
        (tmp_path / WEIGHTS).write_bytes(saved)


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, 0.99])
def test_truncated_files(folder, keep):
    size = os.path.getsize(folder / WEIGHTS)
    os.truncate(folder / WEIGHTS, keep if isinstance(keep, int) else int(size * keep))
    refused(folder, ValueError, "adapter_model.safetensors .* bytes. cannot be read")


def test_garbage(folder):
    (folder / WEIGHTS).write_bytes(b"\xff" * 1000)
    refused(folder, ValueError, "adapter_model.safetensors .1000 bytes. cannot be read")


@pytest.mark.parametrize(
    ("base", "named"),
    [
        (lambda: tiny_t5(d_model=48), r"has shape \(3, 32, 4\).*\(3, 48, 4\)"),
        (lambda: tiny_t5(num_layers=3), "are missing .*encoder.block.2"),
        (lambda: tiny_t5(num_decoder_layers=1), "have no place .*decoder.block.1"),
        (lambda: tiny_t5(head="EncoderModel"), "have no place .*decoder"),
        (tiny_resnet, "does not fit this ResNet.*target_modules"),
        (perceptron, "does not fit this Perceptron"),
    ],
)
def test_another_base(original, base, named):
    refused(original[0], ValueError, named, base=base())


def test_another_number_of_classes(tmp_path):
    routed(tiny_resnet(), modules_to_save=["fc"]).save_pretrained(tmp_path)
    refused(tmp_path, ValueError, r"fc.bias has shape \(5,\).*\(7,\)", base=tiny_resnet(classes=7))
