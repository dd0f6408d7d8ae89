"""One HTML page for a report: tables, and pictures inside it, for a browser without a network."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jinja2

from recipes.report_tables import Table


class Picture(NamedTuple):
    """A PNG file in the report's folder, and what it shows."""

    file: str
    caption: str


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,">
<title>{{ title }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; margin: 2em auto; max-width: 75em; padding: 0 1em; }
nav a { margin-right: 1em; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25em .7em; text-align: right; vertical-align: bottom; border-bottom: 1px solid #ddd; }
td, th:first-child { white-space: nowrap; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
thead th { border-bottom: 2px solid #555; }
.borrowed { border-left: 4px solid #999; padding: .1em 1em; margin: 1.5em 0; background: #f6f6f6; }
.borrowed th:first-child, .borrowed td:first-child { background: #f6f6f6; }
figure { margin: 1.5em 0; } img { max-width: 100%; height: auto; } figcaption { color: #555; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<p>{{ words }}</p>
<nav><p>On this page: {% for table in tables %}<a href="#table-{{ loop.index }}">{{ table.title }}</a>
{% endfor %}{% if pictures %}<a href="#pictures">Figures</a>{% endif %}</p>
<p>Beside it: {% for file in files %}<a href="{{ file }}">{{ file }}</a>
{% endfor %}</p></nav>
{% for table in tables %}
<section id="table-{{ loop.index }}"{% if table.borrowed %} class="borrowed"{% endif %}>
<h2>{{ table.title }}</h2>
{% if table.note %}<p>{{ table.note }}</p>{% endif %}
<div class="wide"><table>
<thead><tr>{% for name in table.columns %}<th scope="col">{{ name }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in table.rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody>
</table></div>
</section>
{% endfor %}
{% if pictures %}<section id="pictures"><h2>Figures</h2>
{% for picture in pictures %}<figure>
<img src="data:image/png;base64,{{ picture.data }}" alt="{{ picture.caption }}">
<figcaption><a href="{{ picture.file }}">{{ picture.file }}</a></figcaption>
</figure>
{% endfor %}</section>{% endif %}
</body>
</html>
"""


def page(
    title: str, words: str, tables: Sequence[Table], pictures: Sequence[Picture], folder: Path, files: list[str]
) -> str:
    """The page as text.

    Args:
        title: of the page.
        words: how to read it.
        tables: in their order; the paper's are set apart.
        pictures: files in `folder`, which go into the page.
        folder: of the report.
        files: others in it, to link to; those of the pictures are linked below each.
    """
    template = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined).from_string(PAGE)
    inside = [{**p._asdict(), "data": base64.b64encode((folder / p.file).read_bytes()).decode()} for p in pictures]
    return template.render(title=title, words=words, tables=tables, pictures=inside, files=files)
