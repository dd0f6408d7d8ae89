"""Peak memory of a piece of work, above what was in use before it."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable
from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_megabytes(work: Callable[[], object]) -> float | None:
    """The most memory that `work` needed beside what was in use before.

    On a CUDA device what torch allocated there, else the process's resident memory (Linux with glibc; None elsewhere).
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if CLEAR.exists() else None
    if trim is None:
        return None
    trim(0)  # what was freed and kept would hide what is needed
    CLEAR.write_text("5")  # resets the peak that the kernel keeps (proc(5))
    before = _kilobytes("VmRSS")
    work()
    return (_kilobytes("VmHWM") - before) / 2**10


def _kilobytes(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", STATUS.read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1])
