"""docs/routing.md says of every method what the registry says."""

import re
from pathlib import Path

import pytest

from smear_peft import ROUTINGS
from smear_peft.routing import get_method

PAGE = (Path(__file__).parents[1] / "docs" / "routing.md").read_text()


@pytest.mark.parametrize("name", ROUTINGS)
def test_every_method_is_described(name):
    method = get_method(name)
    section = re.search(rf"^## {name}$(.*?)(?=^## )", PAGE, re.M | re.S)
    assert section, f"docs/routing.md has no section on {name}"
    text = section.group(1)
    for value in (method.formula, method.cost, method.paper, method.training, method.inference):
        assert value
        assert value in text
    for value in (*method.needs, *method.fields):
        assert f"`{value}`" in text
    for value in method.losses:
        assert value in text.partition("**Terms in the loss:**")[2]
    row = re.search(rf"^\| \[`{name}`\].*$", PAGE, re.M).group(0)
    assert ("`routing_tags`" in row) == ("routing_tags" in method.needs)
    assert ("`example_ids`" in row) == ("example_ids" in method.needs)
    assert row.split("|")[3].strip() == ("no" if method.router.reads == "nothing" else "yes")


def test_no_section_is_left_over():
    titles = re.findall(r"^## (\w+)$", PAGE, re.M)
    assert titles == list(ROUTINGS)
