"""docs/routing.md says of every method what the registry says; no page names a file that is not there."""

import re
from pathlib import Path

import pytest

from smear_peft import ROUTINGS
from smear_peft.routing import get_method

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "routing.md").read_text()


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


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ROOMS = "|".join(["tests", "docs", "recipes", "smear_peft", "benchmarks", "results", "model_cards"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_that_a_page_names_is_there(page):
    text = page.read_text()
    linked = [page.parent / target for target in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in target]
    named = [ROOT / path for path in re.findall(rf"`((?:{ROOMS})/[^\s`<>{{]+)`", text)]
    missing = [str(path) for path in (*linked, *named) if not list(path.parent.glob(path.name))]
    assert linked or named
    assert not missing
