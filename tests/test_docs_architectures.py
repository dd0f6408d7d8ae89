"""docs/architectures.md names every row of the table of sites; its example prints what it says, the README's runs."""

import re

import pytest

from smear_peft.architectures import ARCHITECTURES

from .families import kind_of
from .pages import ROOT, examples, prints_what_it_says

PAGE = (ROOT / "docs" / "architectures.md").read_text()
SEES = {"decoder": "the prompt", "image": "all positions", "timm": "all positions"}


def test_every_row_is_in_the_table():
    rows = re.findall(r"^\| ([^|]+) \| (`[^|]+`) \| ([^|]+) \|$", PAGE, re.M)
    assert [(family, tuple(re.findall(r"`([^`]+)`", sites))) for family, sites, _ in rows] == [
        (row.family, row.sites) for row in ARCHITECTURES
    ]
    for row, (_, _, sees) in zip(ARCHITECTURES, rows, strict=True):
        assert sees.startswith(SEES.get(kind_of(row), "unpadded positions"))
        assert ("encoder's state" in sees) == (kind_of(row) == "encoder-decoder")


def test_the_example_prints_what_the_page_says():
    prints_what_it_says(PAGE)


def test_fine_tuning_as_the_readme_has_it(tmp_path, monkeypatch, capsys):
    """On a tiny model and tokenizer in the place of those that it names."""
    pytest.importorskip("trl", reason="TRL is not installed: pip install trl")
    from .test_trl import llama, tokenizer

    code = next(code for code in examples((ROOT / "README.md").read_text()) if "trl" in code)
    assert len(code.splitlines()) <= 25
    monkeypatch.chdir(tmp_path)
    llama().save_pretrained("base")
    words = [*map(str, range(2, 17)), "plus", "is"]
    tokenizer(" ".join(words)).save_pretrained("base")
    assert '"Qwen/Qwen3-0.6B"' in code
    code = code.replace('"Qwen/Qwen3-0.6B"', '"base"')
    names: dict = {}
    exec(code.replace("max_steps=20", "max_steps=2, use_cpu=True, report_to=[]"), names)
    assert not names["trainer"].model.training, "it would answer with experts dropped"
    assert "3 plus 4 is" in capsys.readouterr().out
    assert (tmp_path / "runs" / "sums" / "adapter_model.safetensors").is_file()
