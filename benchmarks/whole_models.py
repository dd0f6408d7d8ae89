"""Whole models with adapters of any kind in the places where SMEAR's would be, and what is timed of them."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import torch
from torch import Tensor, nn

from benchmarks.case import Job
from smear_peft import list_sites
from smear_peft.site import Site

VOCABULARY = 32000  # token ids that questions are made of
RATE = 1e-6  # so small that weights stay what they are over many steps


class Beside(nn.Module):
    """A site with something after it (text) or before it (an activation of a ResNet)."""

    def __init__(self, base: nn.Module, adapter: nn.Module, before: bool) -> None:
        super().__init__()
        self.base, self.adapter, self.before = base, adapter, before

    @property
    def weight(self) -> Tensor:
        """Of the site; T5 asks for its dtype."""
        return self.base.weight  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        """The site and the adapter."""
        return self.base(self.adapter(x)) if self.before else self.adapter(self.base(x))


def with_adapters(model: nn.Module, make: Callable[[Site], nn.Module]) -> nn.Module:
    """The model with a frozen base and an adapter, made for it, at each of SMEAR's sites."""
    sites = list_sites(model)
    for p in model.parameters():
        p.requires_grad_(False)
    for site in sites:
        owner, _, name = site.name.rpartition(".")
        before = site.placement == "input"
        setattr(model.get_submodule(owner), name, Beside(model.get_submodule(site.name), make(site), before))
    return model


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy whose matrices are the same tensors; a model of this size twice would fill a laptop."""
    return deepcopy(model, {id(p): p for p in model.parameters() if p.ndim > 1})


def questions(batch: int, length: int) -> dict[str, Tensor]:
    """Random tokens, all attended."""
    ids = torch.randint(2, VOCABULARY, (batch, length))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def loss_job(model: nn.Module, given: dict[str, Tensor], train: bool) -> Job:
    """A language model's loss in evaluation mode, or a training step."""
    model.train(train)
    return step_job(model, lambda: model(**given).loss) if train else torch.no_grad()(lambda: model(**given).loss)


def step_job(model: nn.Module, loss: Callable[[], Tensor]) -> Job:
    """Forward, backward and Adam on what trains, in one kernel a tensor as `Trainer` runs it by default."""
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=RATE, fused=True)

    def run() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return run
