"""Shared by the recipes' tests."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from recipes.prompts import INSTALL, templates_folder


@pytest.fixture
def promptsource() -> Path:
    """The installed templates."""
    if importlib.util.find_spec("promptsource") is None:
        pytest.skip(f"promptsource is not installed: {INSTALL}")
    return templates_folder(None)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Torch with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Models as small as these are slowed down by a second thread."""
    with threads(1):
        yield


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """The run folder of an unbroken small T5-GLUE job."""
    from recipes.t5_glue import main  # not for tests that need no T5
    from tests.recipes.small import command

    folder = tmp_path_factory.mktemp("runs") / "unbroken"
    with threads(1):
        main(command(folder, uniform_control=True))
    return folder
