"""The README's first example runs as printed, and prints what it says."""

import re

from .pages import ROOT, prints_what_it_says

README = (ROOT / "README.md").read_text()


def test_first_example_prints_what_the_readme_says():
    prints_what_it_says(README)


def test_config_table_shows_the_real_defaults():
    from smear_peft import SmearConfig

    config = SmearConfig()
    rows = re.findall(r"^\| (`[^|]+`) \| ([^|]+) \|", README.split("## What you can set")[1], re.M)
    shown = [(name, default) for names, default in rows for name in re.findall(r"`(\w+)`", names)]
    assert len(shown) >= 15
    for name, default in shown:
        value = getattr(config, name)
        assert default == ("none" if value is None else f'`"{value}"`' if isinstance(value, str) else str(value)), name
