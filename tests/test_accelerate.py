"""A training loop with Accelerate: states that it saves and loads, and gradients that it accumulates."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from . import models
from .models import images, perceptron, t5_batch, tiny_resnet
from .routed import close, routed

accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")


def text_loss(model: nn.Module, rows: slice, seed: int) -> Tensor:
    return model(**{name: value[rows] for name, value in t5_batch(4, padded=False, seed=seed).items()}).loss


def image_loss(model: nn.Module, rows: slice, seed: int) -> Tensor:
    return model(images(4, seed=seed)[rows]).square().mean()


def vector_loss(model: nn.Module, rows: slice, seed: int) -> Tensor:
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed))
    return model(x[rows].to(models.DEVICE)).square().mean()


KINDS = {
    "T5": (lambda: None, {}, text_loss),
    "ResNet": (tiny_resnet, {"modules_to_save": ["fc"]}, image_loss),
    "any other": (perceptron, {"target_modules": ["first", "act"]}, vector_loss),
}


def made(kind: str, seed: int = 0, **fields) -> tuple[nn.Module, torch.optim.Optimizer]:
    base, more, _ = KINDS[kind]
    model = routed(base(), seed=seed, **more, **fields).train()
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@pytest.fixture
def accelerator(device) -> Iterator[Callable[..., "accelerate.Accelerator"]]:
    """Makes Accelerators; they share a global state, which must not outlive the test."""
    accelerate.state.AcceleratorState._reset_state(True)
    yield lambda **settings: accelerate.Accelerator(cpu=device.type == "cpu", **settings)
    accelerate.state.AcceleratorState._reset_state(True)


@pytest.mark.feature("Accelerate: `save_state`, `load_state`", "T5", "ResNet", "any other")
@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_state_goes_on_as_if_nothing_had_happened(kind, accelerator, tmp_path):
    """Experts are dropped out at random, so that the random state must come back as well."""

    def steps(run, model, optimizer, first: int, last: int) -> None:
        for step in range(first, last):
            run.backward(KINDS[kind][2](model, slice(None), step))
            optimizer.step()
            optimizer.zero_grad()

    run = accelerator()
    model, optimizer = run.prepare(*made(kind, expert_dropout=0.4))
    steps(run, model, optimizer, 0, 3)
    run.save_state(tmp_path)
    saved = state(model)
    steps(run, model, optimizer, 3, 6)
    wanted = state(model)
    assert any(not torch.equal(wanted[name], saved[name]) for name in wanted)

    run = accelerator()
    model, optimizer = run.prepare(*made(kind, seed=1, expert_dropout=0.4))
    steps(run, model, optimizer, 0, 1)  # another life before
    run.load_state(tmp_path)
    assert all(torch.equal(value, saved[name]) for name, value in state(model).items())
    steps(run, model, optimizer, 3, 6)
    assert all(torch.equal(value, wanted[name]) for name, value in state(model).items())


@pytest.mark.feature("gradient accumulation", "T5", "ResNet", "any other")
@pytest.mark.parametrize("kind", KINDS)
def test_accumulated_gradients_are_those_of_one_batch(kind, accelerator):
    """Without the batch norm of image blocks, whose statistics are those of the batch that they see."""
    fields = {"expert_dropout": 0.0, **({"norm": "none"} if kind == "ResNet" else {})}
    found = []
    for parts in (1, 2):
        run = accelerator(gradient_accumulation_steps=parts)
        model, optimizer = run.prepare(*made(kind, **fields))
        before = state(model)
        for part in range(parts):
            with run.accumulate(model):
                run.backward(KINDS[kind][2](model, slice(part * 2, part * 2 + 4 // parts), 1))
                gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
                optimizer.step()
                optimizer.zero_grad()
            moved = any(not torch.equal(value, before[name]) for name, value in state(model).items())
            assert moved == (part == parts - 1)
        found.append(gradients)
    assert found[0].keys() == found[1].keys()
    assert len(found[0]) > 4
    for name, value in found[0].items():
        close(found[1][name], value)
