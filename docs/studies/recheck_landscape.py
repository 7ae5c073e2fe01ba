"""The part of `recheck.py` that looks whether the contours of a landscape lie where the records'
values have their levels."""

import html
import itertools
import re
from collections.abc import Iterator
from typing import Any

Check = tuple[str, float, float]
LEVELS = {"contour low": (0.5, 0.7, 0.8), "contour strong": (0.9,), "contour": (1.0,)}
PIXEL = 0.15
"""What two places in a picture may differ by that are one: it has one decimal."""
_FIGURE = re.compile(r"<figure><h3>([^<]*: [^<]* space of \d+[^<]*)</h3>(<svg.*?</svg>)", re.DOTALL)
_CELL = re.compile(
    r'<rect x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)" rx="2">'
    r"<title>(\S+) at \("
)
_PATH = re.compile(r'<path class="(contour[a-z ]*)" d="M([^"]+)"')


def landscapes(page: str) -> Iterator[tuple[str, str]]:
    """(title, picture) of the landscapes of a page that have contours."""
    for title, picture in _FIGURE.findall(page):
        if 'class="contour' in picture:
            yield html.unescape(title), picture


def contours(title: str, picture: str, record: dict[str, Any]) -> Iterator[Check]:
    """(what, the picture's count, the records' count) of the places where a method's contours cross
    the lines of the grid: those drawn of which the records know, and those due that are drawn."""
    own = {target["method"]: target["own"] for target in record["run"]["targets"]}
    for method in own:
        grid = [r for r in record["measures"] if r.get("method") == method and "x" in r]
        value = {(r["x"], r["y"]): r["value"] / own[method] for r in grid}
        cells = [[float(n) for n in c[:4]] for c in _CELL.findall(picture) if c[4] == method]
        across = sorted({round(left + wide / 2, 2) for left, _, wide, _ in cells})
        upwards = sorted({round(top + tall / 2, 2) for _, top, _, tall in cells}, reverse=True)
        due = list(_crossings(value, across, upwards))
        drawn = [
            (css, *(float(pixel) for pixel in place.split()))
            for css, steps in _PATH.findall(picture)
            for place in steps.split(" L")
            if across[0] - 1 < float(place.split()[0]) < across[-1] + 1
        ]
        for what, some, others in (("drawn", drawn, due), ("due", due, drawn)):
            known = sum(any(_same(one, other) for other in others) for one in some)
            yield f"{title}: contours of {method}, {what}", known, len(some)


def _crossings(
    value: dict[tuple[float, float], float], across: list[float], upwards: list[float]
) -> Iterator[tuple[str, float, float]]:
    """(class, pixels) of where a level lies between the values of two neighbours."""
    xs, ys = sorted({x for x, _ in value}), sorted({y for _, y in value})
    for i, j in itertools.product(range(len(xs)), range(len(ys))):
        for k, m in ((i + 1, j), (i, j + 1)):
            if k == len(xs) or m == len(ys):
                continue
            first, last = value[xs[i], ys[j]], value[xs[k], ys[m]]
            for css, levels in LEVELS.items():
                for level in levels:
                    if min(first, last) < level <= max(first, last):
                        share = (first - level) / (first - last)
                        right = (1 - share) * across[i] + share * across[k]
                        yield css, right, (1 - share) * upwards[j] + share * upwards[m]


def _same(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    return one[0] == other[0] and all(
        abs(a - b) <= PIXEL for a, b in zip(one[1:], other[1:], strict=True)
    )
