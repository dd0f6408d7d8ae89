"""The text block's cases for pytest-benchmark, which keeps what it measured and compares commits.

pip install 'smear-peft[bench]'
OMP_WAIT_POLICY=PASSIVE pytest benchmarks/bench_text_block.py --benchmark-autosave --benchmark-group-by=param:case
OMP_WAIT_POLICY=PASSIVE pytest benchmarks/bench_text_block.py --benchmark-compare
"""

from __future__ import annotations

import time

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.case import Case
from benchmarks.text_block import cases, decoding
from benchmarks.timing import level

ALL = [(case, job) for case in cases() + decoding() for job in case.jobs]


@pytest.mark.parametrize(("case", "name"), ALL, ids=[f"{case.what}: {job}" for case, job in ALL])
@pytest.mark.benchmark(timer=time.thread_time, warmup=True)
def test_block(benchmark: BenchmarkFixture, case: Case, name: str) -> None:
    """One job of a case; `case.make` has checked its numbers."""
    level()
    torch.manual_seed(0)
    benchmark(case.make()[name])
