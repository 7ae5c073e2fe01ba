"""The report in a browser: it sorts, picks out a method, and says nothing on the console.

Oracle: Chromium, and the order of the numbers. Skipped where there is no Chromium.
"""

import html
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deltune.study.report import write_report
from test_study_overview import filled
from test_study_report import fill

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next((found for name in BROWSERS if (found := shutil.which(name))), None)
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason=f"none of {', '.join(BROWSERS)} is installed"
)

SCRIPT = """
<script>
addEventListener('load', () => {
  const found = {errors: window.failed, tables: []};
  for (const table of document.querySelectorAll('table')) {
    table.closest('details')?.setAttribute('open', '');
    const orders = [];
    for (const button of table.querySelectorAll('thead button')) {
      const at = [...table.querySelectorAll('thead button')].indexOf(button);
      const read = () => [...table.tBodies[0].rows].map(row => row.cells[at].dataset.v);
      button.click(); const once = read(); button.click(); orders.push([once, read()]);
    }
    found.tables.push(orders);
  }
  const group = document.querySelector('svg [data-m="LoRA"]');
  group.dispatchEvent(new MouseEvent('click', {bubbles: true}));
  found.picked = document.body.classList.contains('picked');
  found.lit = [...document.querySelectorAll('.m.on')].map(one => one.dataset.m);
  found.overflow = document.documentElement.scrollWidth - innerWidth;
  document.title = JSON.stringify(found);
});
</script></body>"""
WATCH = "<head><script>window.failed = []; onerror = text => failed.push(text);</script>"


def opened(page: str, folder: Path, width: int) -> tuple[dict[str, Any], str]:
    """What the script found on a page of a width, and what the browser wrote."""
    path = folder / "page.html"
    path.write_text(page.replace("<head>", WATCH, 1).replace("</body>", SCRIPT, 1))
    command = [
        str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
        f"--window-size={width},1200", f"--user-data-dir={folder / 'profile'}",
        "--virtual-time-budget=4000", "--dump-dom", path.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    title = done.stdout.split("<title>", 1)[1].split("</title>", 1)[0]
    return json.loads(html.unescape(title)), done.stderr


@pytest.mark.parametrize("width", [1280, 500])
@pytest.mark.parametrize("made", [fill, filled])
def test_the_page_works(tmp_path: Path, made: Callable[[Path], object], width: int) -> None:
    made(tmp_path)
    page = write_report(tmp_path).read_text()
    assert "</body>" in page
    found, said = opened(page, tmp_path, width)
    assert found["errors"] == [] and "CONSOLE" not in said
    assert found["overflow"] <= 0  # the page itself never scrolls sideways
    assert len(found["tables"]) == page.count("<table")
    for orders in found["tables"]:
        for once, twice in orders:
            up, down = sorted(once, key=key), sorted(once, key=key, reverse=True)
            assert [key(v) for v in once] in ([key(v) for v in up], [key(v) for v in down])
            assert [key(v) for v in twice] == [key(v) for v in once][::-1]
    assert found["picked"] and set(found["lit"]) == {"LoRA"}


def key(value: str) -> tuple[int, float, str]:
    """Numbers before texts, as the page sorts."""
    try:
        return 0, float(value), ""
    except ValueError:
        return 1, 0.0, value
