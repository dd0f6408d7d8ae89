"""Schedules: the annealing of ST-Gumbel's temperature, and the faster learning of the skill matrix."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import nn

from smear_peft.routing.hard import STGumbelRouter
from smear_peft.routing.skills import Skill


def temperature_at(step: int, start: float = 10.0, least: float = 0.5, rate: float = 1e-6, every: int = 5000) -> float:
    """The temperature after `step` steps, a function of the step alone, so that a resumed run needs nothing stored.

    The authors anneal in place: at each step s with (s + 1) % every == 0, tau <- max(tau exp(-rate s), least)
    (authors' code). On T5 that happens before the step with index s, on ResNet after it.

    Args:
        step: index s of the last step that may have annealed.
        start: tau at the start.
        least: tau's lower bound.
        rate: 1e-6 on T5, 1e-4 on ResNet in the authors' code.
        every: steps between two annealings, 5000 on T5, 1000 on ResNet.

    Returns:
        tau.
    """
    anneals = (step + 1) // every
    total = sum(i * every - 1 for i in range(1, anneals + 1))
    return max(start * math.exp(-rate * total), least)


def set_temperature(model: nn.Module, tau: float) -> None:
    """Set the temperature of every ST-Gumbel router in a model.

    Args:
        model: with SMEAR adapters.
        tau: positive.

    Raises:
        ValueError: tau is not positive.
    """
    if not 0 < tau < math.inf:
        raise ValueError(f"tau={tau} must be a positive number.")
    for module in model.modules():
        if isinstance(module, STGumbelRouter):
            module.temperature = float(tau)


def parameter_groups(model: nn.Module, lr: float, skill_factor: float = 10.0) -> list[dict[str, Any]]:
    """Trainable parameters for an optimiser, the skill matrices of latent_skills with a learning rate of their own.

    Args:
        model: any model.
        lr: learning rate.
        skill_factor: how much faster the skill matrices learn (authors: 10).

    Returns:
        One or two parameter groups with "params" and "lr".
    """
    skills = {id(m.weight) for m in model.modules() if isinstance(m, Skill)}
    split: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for parameter in trainable(model.parameters()):
        split[id(parameter) in skills].append(parameter)
    groups = [{"params": split[0], "lr": lr}, {"params": split[1], "lr": lr * skill_factor}]
    return [group for group in groups if group["params"]]


def trainable(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Those that require a gradient."""
    return [p for p in parameters if p.requires_grad]
