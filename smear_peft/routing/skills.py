"""Latent skills: each task learns which experts it averages (Ponti et al.; paper, section 2.4)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn

from smear_peft.precision import widened
from smear_peft.routing.base import Query, Router, draw
from smear_peft.routing.mixture import Mixture

if TYPE_CHECKING:
    from smear_peft.config import SmearConfig
    from smear_peft.site import Site


def check_skills(config: SmearConfig) -> None:
    """The skill matrix has a row per task.

    Raises:
        ValueError: no tasks are named.
    """
    if not config.tasks:
        raise ValueError("latent_skills learns a row per task: name them, tasks=['...', '...'].")


class Skill(nn.Module):
    """The task-skill logits (T, N)."""

    def __init__(self, tasks: int, num_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(tasks, num_experts))


class SkillRouter(Router):
    """p = A[task] / sum_n A[task], A = sigmoid(logits) at inference, a relaxed Bernoulli sample in training.

    One sample per site and forward, shared by the batch and never made binary, as in the authors' code
    (authors' code). With `expert_shares` s, A[task]_n counts s_n times. The logits learn with ten times the learning
    rate (`smear_peft.parameter_groups`).
    """

    reads: ClassVar[str] = "nothing"
    expert_axes: ClassVar[dict[str, int] | None] = {"skill.weight": 1}
    copies: ClassVar[str | None] = "share"

    def __init__(self, site: Site, config: SmearConfig) -> None:
        super().__init__(site, config)
        self.skill = Skill(len(config.tasks or ()), config.num_experts)

    def reset_parameters(self, config: SmearConfig) -> None:
        """Logits ~ U(-1e-3, 1e-3)."""
        nn.init.uniform_(self.skill.weight, -1e-3, 1e-3)

    def forward(self, query: Query) -> Mixture:
        """Weights (B, N) by `routing_tags`, to merge by."""
        assert query.tags is not None
        logits = widened(self.skill.weight)
        if self.training:
            uniform = draw(logits)
            logits = logits + torch.log(uniform) - torch.log(1 - uniform)
        skills = logits.sigmoid()[query.tags]
        if (shares := self.shares_like(skills)) is not None:
            skills = skills * shares
        return self.mixture(skills / (skills.sum(-1, keepdim=True) + 1e-12))
