"""What figures were measured on, in words."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

UNITS = {"avx512f": "AVX-512", "avx512_bf16": "AVX-512 BF16", "amx_bf16": "AMX BF16"}  # flags of /proc/cpuinfo


def machine(device: str) -> str:
    """What the figures were measured on."""
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}; {versions}"
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        lines = (line.partition(":") for line in info.read_text().splitlines())
        said = {name.strip(): value.strip() for name, _, value in lines}
        cpu, flags = said.get("model name", cpu), said.get("flags", "").split()
        cpu += "".join(f", {shown}" for flag, shown in UNITS.items() if flag in flags)
    return f"{cpu}; {os.cpu_count()} cores, one thread; {versions}"
