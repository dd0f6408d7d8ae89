"""Shared by all tests: a quiet machine, real data if it is there, no Hub."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_EVALUATE_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same seed."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with the research data (GLUE rows, PACS images), named by SMEAR_DATA."""
    folder = Path(os.environ.get("SMEAR_DATA", "../shared/data"))
    if not (folder / "DATA.md").is_file():
        pytest.skip(f"no research data in {folder}: set SMEAR_DATA to the folder that holds DATA.md")
    return folder.resolve()
