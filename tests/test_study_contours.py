"""Contours. Oracles: the level sets of a plane and of a cone, and a saddle by hand."""

import itertools
import math

import pytest

from deltune.study.page.contours import contours

XS = [-2 + 4 * i / 24 for i in range(25)]
YS = [-1 + 3 * i / 30 for i in range(31)]


def length(line: list[tuple[float, float]]) -> float:
    return sum(math.dist(one, two) for one, two in itertools.pairwise(line))


@pytest.mark.parametrize(("a", "b", "c"), [(1.0, 0.5, 0.2), (-0.3, 1.0, 0.9), (0.0, 2.0, 1.05)])
def test_the_contour_of_a_plane_is_the_line_of_its_equation(a: float, b: float, c: float) -> None:
    """a x + b y = c from border to border: linear interpolation is exact."""
    values = [[a * x + b * y for x in XS] for y in YS]
    (line,) = contours(XS, YS, values, c)
    assert all(a * x + b * y == pytest.approx(c, abs=1e-12) for x, y in line)
    ends = sorted(
        {
            (round(x, 9), round(y, 9))
            for x, y in (
                [(x, (c - a * x) / b) for x in (XS[0], XS[-1])]
                + [((c - b * y) / a, y) for y in (YS[0], YS[-1]) if a]
            )
            if XS[0] <= x <= XS[-1] and YS[0] <= y <= YS[-1]
        }
    )
    assert sorted((round(x, 9), round(y, 9)) for x, y in (line[0], line[-1])) == ends
    assert length(line) == pytest.approx(math.dist(*ends))


def test_the_contour_of_a_cone_is_a_circle() -> None:
    """|| p - m || = r: closed, and off it by no more than the h^2 / 8 r of a chord of an edge."""
    mx, my, r = 0.13, 0.41, 0.8
    values = [[math.hypot(x - mx, y - my) for x in XS] for y in YS]
    (line,) = contours(XS, YS, values, r)
    assert line[0] == line[-1]
    h = max(XS[1] - XS[0], YS[1] - YS[0])
    away = [math.hypot(x - mx, y - my) - r for x, y in line]
    assert max(map(abs, away)) < h**2 / (8 * (r - h)) and max(map(abs, away)) > 0
    assert length(line) == pytest.approx(2 * math.pi * r, rel=0.01)
    twice = sum(x * v - u * y for (x, y), (u, v) in itertools.pairwise(line))
    assert abs(twice) / 2 == pytest.approx(math.pi * r**2, rel=0.01)
    assert contours(XS, YS, values, -0.1) == [] and contours(XS, YS, values, 9.0) == []


def test_two_hills_have_two_contours_and_one_of_them_is_open() -> None:
    """A cone inside the grid, and one whose middle lies on its border."""
    hills = [(-1.0, 0.5, 0.5), (2.0, 0.5, 0.7)]
    values = [[max(r - math.hypot(x - u, y - v) for u, v, r in hills) for x in XS] for y in YS]
    lines = contours(XS, YS, values, 0.0)
    closed = [line for line in lines if line[0] == line[-1]]
    (opened,) = (line for line in lines if line[0] != line[-1])
    assert len(closed) == 1 and all(x < 0 for x, _ in closed[0])
    assert sorted(round(y, 2) for _, y in (opened[0], opened[-1])) == [-0.2, 1.2]
    assert opened[0][0] == opened[-1][0] == 2.0


@pytest.mark.parametrize(
    ("level", "corners"), [(0.4, [(1.0, 0.0), (0.0, 1.0)]), (0.6, [(0.0, 0.0), (1.0, 1.0)])]
)
@pytest.mark.parametrize("turned", [False, True])
def test_a_saddle_connects_the_corners_on_the_side_of_its_mean(
    level: float, corners: list[tuple[float, float]], turned: bool
) -> None:
    """1 at two opposite corners, 0 at the others, 0.5 in the middle: below it the zeros are cut
    off, above it the ones, 0.4 from their corners."""
    values = [[1.0, 0.0], [0.0, 1.0]]
    if turned:
        values, corners = values[::-1], [(x, 1 - y) for x, y in corners]
    lines = contours([0.0, 1.0], [0.0, 1.0], values, level)
    found = []
    for line in lines:
        assert length(line) == pytest.approx(0.4 * 2**0.5)
        (near,) = (
            (x, y)
            for x in (0.0, 1.0)
            for y in (0.0, 1.0)
            if all(math.dist((x, y), p) == pytest.approx(0.4) for p in line)
        )
        found.append(near)
    assert sorted(found) == sorted(corners)
