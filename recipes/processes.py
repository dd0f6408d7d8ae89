"""The processes of a job: one, or as many as `torchrun` or `accelerate launch` started."""

from __future__ import annotations

import os

import torch
from accelerate import PartialState


def processes() -> PartialState:
    """Which process this is, and of how many. Accelerate must be told that there is no other device than the CPU."""
    return PartialState(cpu=not torch.accelerator.is_available())


def cores(world: int) -> int:
    """This process' share of the cores that it may run on, among `world` processes of a machine; at least one."""
    return max(1, len(os.sched_getaffinity(0)) // world)
