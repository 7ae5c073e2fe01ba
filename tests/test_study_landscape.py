"""The picture of a landscape. Oracles: what a plane is over the plane, read off the drawing."""

import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from deltune.errors import StudyError
from deltune.study.page.landscape import plane_figure
from deltune.study.spaces import _plane
from deltune.subspace.landscape import Plane

XS, YS = (-1.0, 0.0, 1.0, 2.0, 3.0), (0.0, 0.5, 1.0, 1.5, 2.0)
OWN = {"one": 0.5, "two": 0.8}
Surface = Callable[[float, float], float]


def drawn(surfaces: dict[str, Surface]) -> ElementTree.Element:
    """The picture of these relative performances."""
    rows: list[dict[str, Any]] = [{"mark": "one", "x": 0.0, "y": 0.0}]
    for name, surface in surfaces.items():
        rows += [
            {"method": name, "x": x, "y": y, "value": OWN[name] * surface(x, y)}
            for y in YS
            for x in XS
        ]
    own = {name: OWN[name] for name in surfaces}
    return ElementTree.fromstring(plane_figure(rows, own, "t: a space").picture)


def cells(picture: ElementTree.Element) -> dict[tuple[str, float, float], tuple[float, ...]]:
    """(method, x, y) -> (shade, the pixels of the middle)."""
    found = {}
    for group in picture.findall("g"):
        square, said = group[0], re.match(r"(\w+) at \((\S+), (\S+)\)", group[0][0].text or "")
        if said:
            left, top, wide, tall = (float(square.attrib[n]) for n in ("x", "y", "width", "height"))
            shade = float(group.attrib["style"].removeprefix("--v:"))
            key = said[1], float(said[2]), float(said[3])
            found[key] = shade, left + wide / 2, top + tall / 2
    return found


def paths(picture: ElementTree.Element, css: str) -> list[list[tuple[float, float]]]:
    """The points of the lines of a class."""
    own = [one.attrib["d"] for one in picture.findall("path") if one.attrib["class"] == css]
    every = [re.findall(r"([-\d.]+) ([-\d.]+)", steps) for steps in own]
    return [[(float(x), float(y)) for x, y in one] for one in every]


def numbers(picture: ElementTree.Element, anchor: str, ending: str = "") -> dict[float, Any]:
    """The values of the ticks with an anchor -> their element."""
    texts = [one for one in picture.findall("text") if one.attrib["class"] == "tick"]
    return {
        float(one.text.removesuffix(ending)): one
        for one in texts
        if one.attrib["text-anchor"] == anchor and one.text and one.text.endswith(ending)
    }


@pytest.mark.parametrize("base", [0.3, 0.95, 1.2])
def test_the_shades_are_linear_in_the_value_wherever_it_is(base: float) -> None:
    """Also where every method is above its own delta everywhere; the scale says what they mean."""
    surfaces: dict[str, Surface] = {"one": lambda x, y: base + 0.1 * x + 0.12,
                                    "two": lambda x, y: base + 0.05 * y}  # fmt: skip
    picture = drawn(surfaces)
    found = cells(picture)
    assert len(found) == 50
    value = {key: surfaces[key[0]](*key[1:]) for key in found}
    low, high = (pick(found, key=lambda key: value[key]) for pick in (min, max))
    slope = (found[high][0] - found[low][0]) / (value[high] - value[low])
    assert slope * (value[high] - value[low]) > 0.8
    for key, (shade, *_) in found.items():
        assert shade - found[low][0] == pytest.approx(slope * (value[key] - value[low]), abs=0.002)
    bar = [group[0] for group in picture.findall("g") if not group[0][0].text]
    tops = [float(box.attrib["y"]) for box in bar]
    foot = max(tops) + float(bar[0].attrib["height"])
    ticks = numbers(picture, "start", " %")
    assert len(ticks) >= 3
    for percent, text in ticks.items():
        shade = (foot - (float(text.attrib["y"]) - 4)) / (foot - min(tops))
        expected = found[low][0] + slope * (percent / 100 - value[low])
        assert shade == pytest.approx(expected, abs=0.01)


def test_one_value_everywhere_has_one_shade_and_a_scale_around_it() -> None:
    picture = drawn({"one": lambda x, y: 1.3, "two": lambda x, y: 1.3})
    assert {round(shade, 1) for shade, *_ in cells(picture).values()} == {0.5}
    assert any(percent < 130 for percent in numbers(picture, "start", " %"))


def test_contours_lie_where_a_plane_has_their_level() -> None:
    """0.75 + 0.1 x has 70 % at -0.5, 80 % at 0.5, 90 % at 1.5, 100 % at 2.5, and no 50 %."""
    picture = drawn({"one": lambda x, y: 0.75 + 0.1 * x})
    place = cells(picture)
    ends = [place["one", x, 0.0][1] for x in (-1.0, 3.0)]
    scale = max(ends) + 20
    for css, at in (("contour low", [-0.5, 0.5]), ("contour strong", [1.5]), ("contour", [2.5])):
        lines = [line for line in paths(picture, css) if line[0][0] < scale]
        assert len(lines) == len(at)
        for line, x in zip(sorted(lines), at, strict=True):
            pixel = ends[0] + (x + 1) / 4 * (ends[1] - ends[0])
            assert len(line) == 5 and all(px == pytest.approx(pixel, abs=0.06) for px, _ in line)
            rows = sorted(place["one", -1.0, y][2] for y in YS)
            assert sorted(py for _, py in line) == pytest.approx(rows, abs=0.11)
        assert len(paths(picture, css)) == 2 * len(at)  # and each on the colour scale


def test_axes_tell_the_coordinates_in_which_both_are_as_long() -> None:
    picture = drawn({"one": lambda x, y: x + 2, "two": lambda x, y: y + 1})
    place = cells(picture)
    across = [place["one", x, 0.0][1] for x in XS]
    upwards = [place["one", 0.0, y][2] for y in YS]
    unit = across[1] - across[0]
    assert all(b - a == pytest.approx(unit, abs=0.11) for a, b in pairwise(across))
    assert all(a - b == pytest.approx(unit / 2, abs=0.11) for a, b in pairwise(upwards))
    left = {tick: one for tick, one in numbers(picture, "end").items()}
    assert set(left) == {0.0, 0.5, 1.0, 1.5, 2.0}
    for y, text in left.items():
        assert float(text.attrib["y"]) - 4 == pytest.approx(upwards[0] - y * unit, abs=0.2)
    below = numbers(picture, "middle")  # those of the second map
    assert set(below) == set(XS)
    for x, text in below.items():
        assert float(text.attrib["x"]) == pytest.approx(place["two", x, 0.0][1], abs=0.2)


def test_what_is_framed_is_what_all_methods_reach() -> None:
    """One reaches 90 % from x = 1 on, two from y = 1 on: a frame of three by three cells."""
    picture = drawn({"one": lambda x, y: 0.8 + 0.15 * x, "two": lambda x, y: 0.8 + 0.15 * y})
    place = cells(picture)
    lines = [line for line in picture.findall("line") if line.attrib["class"] == "border"]
    for method in OWN:
        xs, ys = ([place[method, x, y][at] for x in XS[2:] for y in YS[2:]] for at in (1, 2))
        half = [
            abs(place[method, -1.0, 0.0][at] - place[method, 0.0, 0.5][at]) / 2 for at in (1, 2)
        ]
        sides = (min(xs) - half[0], min(ys) - half[1], max(xs) + half[0], max(ys) + half[1])
        own = [line for line in lines if sides[0] - 1 < float(line.attrib["x1"]) < sides[2] + 1]
        assert len(own) == 12
        found = [[float(line.attrib[name]) for line in own] for name in ("x1", "y1", "x2", "y2")]
        corners = (min(found[0]), min(found[1]), max(found[2]), max(found[3]))
        assert corners == pytest.approx(sides, abs=0.2)


def test_codes_of_two_numbers_are_their_own_plane() -> None:
    """Whatever they are, also two of them, or three on a line; longer ones need a plane."""
    for codes in (torch.randn(3, 2), torch.randn(2, 2), torch.tensor([[0.0, 0], [1, 1], [2, 2]])):
        plane = _plane(list(codes))
        for code in codes:
            assert plane.place(code) == tuple(code.tolist())
            assert torch.equal(plane.code(*code.tolist()), code)
    longer = torch.randn(3, 5)
    wanted = Plane.through(*longer)
    assert torch.equal(_plane(list(longer)).axes, wanted.axes)
    with pytest.raises(StudyError, match="the codes of three methods; there are 2"):
        _plane(list(longer[:2]))
