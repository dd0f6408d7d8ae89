"""How decided, how different and how telling distributions over experts are: the measures of telemetry and analysis."""

from __future__ import annotations

import math

import torch
from torch import Tensor

TINY = 1e-12  # less weight than this is none


def normalised(weights: Tensor) -> Tensor:
    """Weights (..., N) made to sum to 1; dselect_k's need not. All zeros stay zeros."""
    return weights / weights.sum(-1, keepdim=True).clamp_min(TINY)


def entropy(distributions: Tensor) -> Tensor:
    """Entropy in nats of distributions (..., N): 0 where one expert has it all, log N where all have the same."""
    return torch.special.entr(distributions).sum(-1)


def mutual_information(given_task: Tensor, tasks: Tensor) -> Tensor:
    """What the route says about the task, in nats: H(mean route) minus the mean of H(a task's route).

    0 where all tasks are routed alike; the entropy of the tasks where no two share an expert.

    Args:
        given_task: (T, ..., N), the mean route of each task.
        tasks: (T,), how likely each task is.

    Returns:
        (...), never negative.
    """
    shares = tasks.reshape(-1, *[1] * (given_task.ndim - 1))
    together = (shares * given_task).sum(0)
    apart = (shares.squeeze(-1) * entropy(given_task)).sum(0)
    return (entropy(together) - apart).clamp_min(0.0)


def total_variation(a: Tensor, b: Tensor) -> Tensor:
    """Half the summed difference of distributions (..., N): the share of the weight that goes elsewhere, 0 to 1."""
    return (a - b).abs().sum(-1) / 2


def jensen_shannon(a: Tensor, b: Tensor) -> Tensor:
    """Jensen-Shannon divergence of distributions (..., N) in bits: 0 for the same, 1 where they share no expert."""
    shares = torch.full((2,), 0.5, dtype=a.dtype, device=a.device)
    return mutual_information(torch.stack(torch.broadcast_tensors(a, b)), shares) / math.log(2)
