"""Schedules: the annealing of ST-Gumbel's temperature, and the faster learning of the skill matrix."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from smear_peft.routing.hard import STGumbelRouter
from smear_peft.routing.skills import Skill
from smear_peft.trace import routed_layers

SKILL_FACTOR = 10.0


def temperature_at(step: int, start: float = 10.0, least: float = 0.5, rate: float = 1e-6, every: int = 5000) -> float:
    """The temperature after `step` steps, a function of the step alone, so that a resumed run needs nothing stored.

    The authors anneal in place: at each step s with (s + 1) % every == 0, tau <- max(tau exp(-rate s), least). On T5
    that happens before the step with index s, on ResNet after it.

    Args:
        step: index s of the last step that may have annealed.
        start: tau at the start.
        least: tau is not annealed below.
        rate: 1e-6 on T5, 1e-4 on ResNet in the authors' code.
        every: steps between two annealings, 5000 on T5, 1000 on ResNet.

    Returns:
        tau.
    """
    times = (step + 1) // every
    total = every * times * (times + 1) // 2 - times  # of s = every - 1, 2 every - 1, ...
    return min(start, max(start * math.exp(-rate * total), least))


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


def anneal_temperature(model: nn.Module, step: int, every: int = 5000) -> None:
    """Set the temperature of every ST-Gumbel router to that of a step, each by its own adapter's configuration.

    Args:
        model: with SMEAR adapters.
        step: index of the step that comes.
        every: steps between two annealings.
    """
    for _, layer in routed_layers(model):
        for name in layer.smear_block:
            router, config = layer.block(name).routing, layer.block(name).config
            if isinstance(router, STGumbelRouter):
                tau = temperature_at(step, config.temperature, config.min_temperature, config.anneal_rate, every)
                router.temperature = tau


def parameter_groups(model: nn.Module, lr: float, skill_factor: float = SKILL_FACTOR) -> list[dict[str, Any]]:
    """Trainable parameters for an optimiser, the skill matrices of latent_skills with a learning rate of their own.

    Args:
        model: any model.
        lr: learning rate.
        skill_factor: how much faster the skill matrices learn (authors: 10).

    Returns:
        One or two parameter groups with "params" and "lr".
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = faster_skills(model, [{"params": trained, "lr": lr}], skill_factor)
    return [group for group in groups if group["params"]]


def faster_skills(
    model: nn.Module, groups: list[dict[str, Any]], skill_factor: float = SKILL_FACTOR
) -> list[dict[str, Any]]:
    """An optimiser's parameter groups, each group's skill matrices split off into one with a higher learning rate.

    Args:
        model: that the parameters are of.
        groups: with "params" and "lr", and whatever else, which both parts keep.
        skill_factor: how much faster the skill matrices learn.

    Returns:
        The groups in their order, and the same dicts where they hold no skill matrix; then those of the skill matrices.
    """
    skills = {id(module.weight) for module in model.modules() if isinstance(module, Skill)}
    rest, fast = [], []
    for group in groups:
        found = [p for p in group["params"] if id(p) in skills]
        rest.append({**group, "params": [p for p in group["params"] if id(p) not in skills]} if found else group)
        if found:
            fast.append({**group, "params": found, "lr": group["lr"] * skill_factor})
    return rest + fast
