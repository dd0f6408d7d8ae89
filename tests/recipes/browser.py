"""Debian's headless chromium, as a reader of a page on this disk."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

CHROMIUM = shutil.which("chromium")
OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--enable-logging=stderr", "--v=0",
    "--window-size=1300,900",
)  # fmt: skip

# Runs in the page, once all in it has loaded or failed, and leaves what a reader sees as text for --dump-dom.
LOOK = """
<script>
addEventListener("load", () => {
  const seen = element => {
    const box = element.getBoundingClientRect();
    return element.checkVisibility({checkOpacity: true, checkVisibilityCSS: true}) && box.width > 1 && box.height > 1;
  };
  const found = {
    tables: [...document.querySelectorAll("table")].map(table => ({
      seen: [table, ...table.rows].every(seen),
      cells: [...table.rows].map(row => [...row.cells].map(cell => cell.innerText.trim())),
    })),
    images: [...document.images].map(image => ({
      seen: seen(image), decoded: image.complete, width: image.naturalWidth, height: image.naturalHeight,
    })),
    overflow: document.documentElement.scrollWidth - innerWidth,
  };
  const left = document.createElement("pre");
  left.id = "found";
  left.textContent = JSON.stringify(found);
  document.body.append(left);
});
</script>
"""


class Seen(NamedTuple):
    """What a browser shows of a page.

    Attributes:
        tables: of each "seen" and "cells", the text of its rows.
        images: of each "seen", "decoded", and "width" and "height" in pixels of the picture itself.
        overflow: pixels by which the page is wider than its window.
        console: what it wrote there. Of a picture that is not there it says nothing: its width is 0.
    """

    tables: list[dict[str, Any]]
    images: list[dict[str, Any]]
    overflow: int
    console: list[str]


def look(page: Path, profile: Path) -> Seen:
    """Open a page from the file system with a new profile; the script that looks stands in a copy beside the page."""
    copy = page.with_name("looked_at.html")
    copy.write_text(page.read_text(encoding="utf-8") + LOOK, encoding="utf-8")
    done = subprocess.run(
        [CHROMIUM, *OPTIONS, "--virtual-time-budget=10000", f"--user-data-dir={profile}", "--dump-dom", copy.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    copy.unlink()
    left = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.S)
    assert left is not None, done.stderr[-3000:]
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    return Seen(**json.loads(html.unescape(left[1])), console=console)
