"""After real training steps, a saved adapter on a fresh base answers what the trained model answers, bit for bit."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from torch.nn import functional as F

from smear_peft import ROUTINGS, SmearConfig, load, routed_loss

from .models import images, t5_batch, tiny_resnet, tiny_t5
from .routed import TASKS, extras

SMALL = {"num_experts": 3, "bottleneck_dim": 4}


def reloads(folder, make):
    """The ways to load from a folder onto a fresh base."""
    return {
        "from_pretrained": PeftModel.from_pretrained(make(), folder),
        "low_cpu_mem_usage": PeftModel.from_pretrained(make(), folder, low_cpu_mem_usage=True),
        "smear_peft.load": load(make(), folder, adapter_name="other"),
    }


def train(model, loss_of, steps=4):
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(step).backward()
        optimizer.step()
    return model.eval()


def fields_of(routing):
    return {**SMALL, "routing": routing, "tasks": TASKS if routing == "latent_skills" else None}


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.feature("reloaded answers are equal bit for bit", "T5")
def test_t5(tmp_path, routing):
    model = get_peft_model(tiny_t5(dropout_rate=0.1), SmearConfig(**fields_of(routing)))
    start = {name: p.clone() for name, p in model.named_parameters() if p.requires_grad}
    extra = extras(routing, 3)
    train(model, lambda step: routed_loss(model, {**t5_batch(seed=step), **extra})[0])
    norms = [name for name in start if ".smear_norm." in name]
    assert len(norms) == 12
    assert all(not torch.equal(model.get_parameter(name), start[name]) for name in norms)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        wanted = model(**t5_batch(), **extra).logits
        assert (wanted - tiny_t5()(**t5_batch()).logits).abs().max() > 1e-2
        for way, again in reloads(tmp_path, tiny_t5).items():
            assert torch.equal(again.eval()(**t5_batch(), **extra).logits, wanted), way


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.feature("reloaded answers are equal bit for bit", "ResNet")
def test_resnet(tmp_path, routing):
    model = get_peft_model(tiny_resnet("resnet18"), SmearConfig(**fields_of(routing), modules_to_save=["fc"]))
    extra = extras(routing, 3)
    labels = torch.tensor([0, 1, 2])
    forwards = 8 if routing == "adamix" else 4  # its loss compares two passes

    def loss_of(step):
        batch = {"x": images(seed=step), "labels": labels, **extra}
        return routed_loss(model, batch, lambda out, given: F.cross_entropy(out, given["labels"], reduction="none"))[0]

    train(model, loss_of)
    block = model.get_submodule("base_model.model.layer3.1.act2").block_state("default")
    assert block["norm.num_batches_tracked"] == forwards
    assert block["norm.running_mean"].abs().max() > 0
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        wanted = model(images(), **extra)
        for way, again in reloads(tmp_path, lambda: tiny_resnet("resnet18")).items():
            assert torch.equal(again.eval()(images(), **extra), wanted), way


def statistics(model):
    """Running statistics of the base's own BatchNorms."""
    return {
        name: (module.running_mean.clone(), module.running_var.clone(), module.num_batches_tracked.clone())
        for name, module in model.named_modules()
        if isinstance(module, nn.BatchNorm2d) and ".smear_" not in name
    }


@pytest.mark.filterwarnings("ignore:base_batch_norm=")  # that the base drifts is meant
@pytest.mark.parametrize(("setting", "moves"), [("frozen", False), ("train", True), ("drift", True)])
def test_statistics_of_frozen_batch_norms(setting, moves):
    model = get_peft_model(tiny_resnet(), SmearConfig(**SMALL, base_batch_norm=setting)).train()
    before = statistics(model)
    assert len(before) > 8
    model(images())
    after = statistics(model)
    for name, tensors in before.items():
        assert all(torch.equal(a, b) for a, b in zip(tensors, after[name], strict=True)) is not moves, name


def test_frozen_batch_norms_normalise_by_their_statistics_in_training():
    model = get_peft_model(tiny_resnet(), SmearConfig(**SMALL, routing="single", norm="none"))
    alone = model.eval()(images())
    torch.testing.assert_close(model.train()(images()), alone)
    assert (model(images())[:1] - model(images()[:1])).abs().max() < 1e-4


def test_batch_norms_in_modules_to_save_train_and_reload(tmp_path):
    model = get_peft_model(tiny_resnet(), SmearConfig(**SMALL, modules_to_save=["layer4.0.bn2", "fc"]))
    train(model, lambda step: model(images(seed=step)).square().mean())
    trained = model.base_model.model.layer4[0].bn2.modules_to_save["default"]
    assert trained.num_batches_tracked == 4
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        wanted = model(images())
        for way, again in reloads(tmp_path, tiny_resnet).items():
            assert torch.equal(again.eval()(images()), wanted), way


def test_training_goes_on_where_it_stopped(tmp_path):
    def steps(model, first, last):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for step in range(first, last):
            torch.manual_seed(step)
            optimizer.zero_grad()
            model.train()(**t5_batch(seed=step)).loss.backward()
            optimizer.step()

    straight = get_peft_model(tiny_t5(), SmearConfig(**SMALL))
    torch.manual_seed(0)
    stopped = get_peft_model(tiny_t5(), SmearConfig(**SMALL))
    stopped.load_state_dict(straight.state_dict())
    steps(straight, 0, 6)
    steps(stopped, 0, 3)
    stopped.save_pretrained(tmp_path)
    resumed = load(tiny_t5(), tmp_path, is_trainable=True)
    steps(resumed, 3, 6)
    for name, parameter in straight.named_parameters():
        assert torch.equal(parameter, resumed.get_parameter(name)), name
