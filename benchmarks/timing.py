"""Interleaved medians of thread CPU time (CUDA: of events): ratios that hold on shared and noisy machines."""

from __future__ import annotations

import ctypes
import random
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

# Of mallopt(3): parameters and values.
M_TRIM_THRESHOLD, KEPT = -1, 2**30
M_MMAP_THRESHOLD, LARGEST = -3, 2**25


def level() -> None:
    """Take away what would make one of two jobs slower by chance: other threads, fresh pages, denormal numbers.

    Gradients of a base with random weights are full of denormal numbers, trained ones hardly meet any.
    """
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    _keep_freed_memory()


def _keep_freed_memory() -> None:
    """Make glibc behave from the start as it does in a process that has run for a while; elsewhere nothing.

    It learns to serve all but the largest tensors from memory that was freed before, but gives the end of its heap back
    whenever that is large: then one of two jobs gets fresh pages in each round, at more than the price of its work, and
    which of the two is chance.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGEST)
        mallopt(M_TRIM_THRESHOLD, KEPT)


def interleaved(
    jobs: Mapping[str, Callable[[], object]], repeats: int, seed: int = 0, device: str = "cpu"
) -> dict[str, list[float]]:
    """Seconds of each job in each round, of this thread's CPU time or between two events of a CUDA device.

    The jobs take turns in a new random order each round. A round calls each one twice and times the second call, so
    that every job finds caches and allocator as itself has left them.

    Args:
        jobs: name -> what to time.
        repeats: rounds.
        seed: of the order.
        device: where the jobs run.
    """
    timed = thread_seconds if device == "cpu" else cuda_seconds
    order = random.Random(seed)
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(repeats):
        for name in order.sample(list(jobs), len(jobs)):
            jobs[name]()
            seconds[name].append(timed(jobs[name]))
    return seconds


def medians(jobs: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Median seconds of each job; arguments as of `interleaved`."""
    return {name: statistics.median(values) for name, values in interleaved(jobs, repeats).items()}


def thread_seconds(job: Callable[[], object]) -> float:
    """CPU time of this thread."""
    start = time.thread_time()
    job()
    return time.thread_time() - start


def cuda_seconds(job: Callable[[], object]) -> float:
    """Between two events on the current stream of a CUDA device."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    job()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


def forward(function: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], object]:
    """`function(x)` without gradients."""

    def job() -> None:
        with torch.no_grad():
            function(x)

    return job


def training(function: Callable[[Tensor], Tensor], x: Tensor, parameters: Sequence[Tensor]) -> Callable[[], object]:
    """`function(x)` and its backward pass, down to x and to the parameters that it uses."""
    leaf = x.clone().requires_grad_()
    towards = torch.ones_like(x)

    def job() -> None:
        torch.autograd.grad(function(leaf), [leaf, *parameters], towards, allow_unused=True)

    return job
