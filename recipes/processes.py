"""The processes of a job: one, or as many as `torchrun` or `accelerate launch` started."""

from __future__ import annotations

import torch
from accelerate import PartialState


def processes() -> PartialState:
    """Which process this is, and of how many. Accelerate must be told that there is no other device than the CPU."""
    return PartialState(cpu=not torch.accelerator.is_available())
