"""Shared by the recipes' tests."""

import importlib.util
from pathlib import Path

import pytest

from recipes.prompts import INSTALL, templates_folder


@pytest.fixture
def promptsource() -> Path:
    """The installed templates."""
    if importlib.util.find_spec("promptsource") is None:
        pytest.skip(f"promptsource is not installed: {INSTALL}")
    return templates_folder(None)
