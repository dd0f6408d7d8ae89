"""Shared by all tests: a quiet machine, real data if it is there, no Hub."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_EVALUATE_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import pytest
import torch

from . import models


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "feature(name, *architectures): what a test shows, for README.md (tests/matrix.py)"
    )


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same seed."""
    torch.manual_seed(0)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch) -> torch.device:
    """The tests that use it run on the CPU and, where there is one, on a GPU: `models` puts everything there."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    monkeypatch.setattr(models, "DEVICE", torch.device(request.param))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # else convolutions have 10 bits of mantissa
    return models.DEVICE


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with the research data (GLUE rows, PACS images), named by SMEAR_DATA."""
    folder = Path(os.environ.get("SMEAR_DATA", "../shared/data"))
    if not (folder / "DATA.md").is_file():
        pytest.skip(f"no research data in {folder}: set SMEAR_DATA to the folder that holds DATA.md")
    return folder.resolve()
