"""The examples in a page of documentation, run as they are printed."""

import contextlib
import io
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def examples(page: str) -> list[str]:
    """The blocks of Python in a page."""
    return re.findall(r"```python\n(.*?)```", page, re.S)


def run_examples(page: str, names: dict[str, Any], before: Any = None) -> dict[str, Any]:
    """Run them all, one after another, on what they take for granted.

    Args:
        page: Markdown.
        names: that the examples use; they add their own.
        before: called with the names before each one.
    """
    for code in examples(page):
        if before is not None:
            before(names)
        exec(code, names)
    return names


def prints_what_it_says(page: str) -> None:
    """The first example with an output prints just that."""
    code, printed = re.search(r"```python\n(.*?)```\n```text\n(.*?)```", page, re.S).groups()
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(code, {})
    assert out.getvalue() == printed
