"""Figures of the plane of a task's codes and of the lines between them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deltune.study.page.contours import contours
from deltune.study.page.figures import Figure, lines, slots
from deltune.study.page.svg import BAR, Axis, Canvas, Series, colours, covering, tick
from deltune.study.plan import Plan, Run

SHARE = 0.9
"""Of its own delta, from which on a method counts as well off in a landscape."""
LEVELS = (0.5, 0.7, 0.8, SHARE, 1.0)
"""Of relative performance, at which contours are drawn."""
SIDE, LEFT, GAP, TOP, FOOT = 150.0, 30.0, 14.0, 26.0, 34.0
"""Pixels: a map's width, and what is to the left of the first, between two, above and below."""

LAND = f"""The plane through the codes that three methods found for a task (marked), each point
decoded by each method: its test metric over that of the method's own delta, in the colours of one
scale. Contours, linear between the points: {", ".join(f"{level:.0%}" for level in LEVELS)}; that of
{SHARE:.0%} is stronger, those below are dotted. Framed: where all of them reach {SHARE:.0%}.
Paths: the line between two codes; each curve names the method that decodes it."""


def landscape(plan: Plan, run: Run, rows: Sequence[dict[str, Any]], space: str) -> list[Figure]:
    """The figures of a survey that has finished.

    Args:
        plan: of the study.
        run: the survey.
        rows: its measures.
        space: what the space is called.
    """
    if not rows:
        return []
    title = f"{plan.task(run.task['name']).title}: {space}"
    own = {target["method"]: target["own"] for target in run.targets or ()}
    return [plane_figure(rows, own, title), *_paths(plan, rows, title)]


def plane_figure(rows: Sequence[dict[str, Any]], own: Mapping[str, float], title: str) -> Figure:
    """One map for each method, side by side, on the same plane.

    Args:
        rows: of a survey: `method`, `x`, `y`, `value`, and the marked codes: `mark`, `x`, `y`.
        own: method -> the metric that is 100 %.
        title: what the plane is of.
    """
    grid = [row for row in rows if "x" in row and "method" in row]
    xs, ys = (sorted({row[axis] for row in grid}) for axis in ("x", "y"))
    value = {(r["method"], r["x"], r["y"]): r["value"] / own[r["method"]] for r in grid}
    joint = {(x, y) for x in xs for y in ys if all(value[m, x, y] >= SHARE for m in own)}
    scale = Axis(*covering(list(value.values())), 0.0, 1.0)
    tall = SIDE * (ys[-1] - ys[0]) / (xs[-1] - xs[0])
    wide = LEFT + (SIDE + GAP) * len(own)
    canvas = Canvas(title, wide + BAR + 44, TOP + tall + FOOT)
    for place, method in enumerate(own):
        land = _Map.beside(canvas, xs, ys, LEFT + place * (SIDE + GAP), tall)
        land.paint([[value[method, x, y] for x in xs] for y in ys], scale, method)
        land.ticks(numbered=not place)
        land.frame(joint)
        land.mark([row for row in rows if "mark" in row])
    _scale(canvas, scale, wide, tall)
    area = len(joint) / (len(xs) * len(ys))
    caption = f"All methods reach {SHARE:.0%} of their own deltas on {area:.0%} of the area."
    data = tuple((m, round(x, 4), round(y, 4), round(v, 4)) for (m, x, y), v in value.items())
    return Figure(title, caption, canvas.render(), ("decoded as", "x", "y", "relative"), data)


@dataclass(frozen=True)
class _Map:
    """One method's map. A length is as many pixels in x as in y; each point of the grid is the
    middle of its cell."""

    canvas: Canvas
    xs: Sequence[float]
    ys: Sequence[float]
    across: Axis
    upwards: Axis
    cell: tuple[float, float]

    @classmethod
    def beside(
        cls, canvas: Canvas, xs: Sequence[float], ys: Sequence[float], left: float, tall: float
    ) -> "_Map":
        """The map whose left border is given."""
        wide, high = SIDE / len(xs), tall / len(ys)
        across = Axis(xs[0], xs[-1], left + wide / 2, left + SIDE - wide / 2)
        upwards = Axis(ys[0], ys[-1], TOP + tall - high / 2, TOP + high / 2)
        return cls(canvas, xs, ys, across, upwards, (wide, high))

    def paint(self, values: Sequence[Sequence[float]], scale: Axis, method: str) -> None:
        """The cells in their colours, and the contours."""
        wide, high = self.cell
        left, top = self.across.start - wide / 2, self.upwards.end - high / 2
        self.canvas.text(left, top - 8, f"decoded as {method}", "label ink")
        for y, row in zip(self.ys, values, strict=True):
            for x, value in zip(self.xs, row, strict=True):
                at = self.across.at(x) - wide / 2, self.upwards.at(y) - high / 2
                words = f"{method} at ({x:.3g}, {y:.3g}): {value:.3f}"
                self.canvas.heat(*at, wide, scale.at(value), "", words, tall=high)
        for level in LEVELS:
            for line in contours(self.xs, self.ys, values, level):
                drawn = [(self.across.at(x), self.upwards.at(y)) for x, y in line]
                self.canvas.path(drawn, _contour(level))

    def ticks(self, numbered: bool) -> None:
        """The axes' numbers, those of y where they are wanted."""
        left, foot = self.across.start - self.cell[0] / 2, self.upwards.start + self.cell[1] / 2
        for value in self.across.ticks():
            at = self.across.at(value)
            self.canvas.line(at, foot, at, foot + 4, "axis")
            self.canvas.text(at, foot + 16, tick(value), "tick", "middle")
        self.canvas.text(left + SIDE / 2, foot + 30, "x", "name", "middle")
        for value in self.upwards.ticks():
            at = self.upwards.at(value)
            self.canvas.line(left - 4, at, left, at, "axis")
            if numbered:
                self.canvas.text(left - 6, at + 4, tick(value), "tick", "end")
        if numbered:
            self.canvas.text(left - 6, TOP - 8, "y", "name", "end")

    def frame(self, inside: set[tuple[float, float]]) -> None:
        """The border of a set of grid points."""
        right, up = self.cell[0] / 2, self.cell[1] / 2
        for column, x in enumerate(self.xs):
            for row, y in enumerate(self.ys):
                if (x, y) not in inside:
                    continue
                px, py = self.across.at(x), self.upwards.at(y)
                beside = {
                    (-1, 0): (px - right, py - up, px - right, py + up),
                    (1, 0): (px + right, py - up, px + right, py + up),
                    (0, -1): (px - right, py + up, px + right, py + up),
                    (0, 1): (px - right, py - up, px + right, py - up),
                }
                for (step, rise), edge in beside.items():
                    at, level = column + step, row + rise
                    known = 0 <= at < len(self.xs) and 0 <= level < len(self.ys)
                    if not known or (self.xs[at], self.ys[level]) not in inside:
                        self.canvas.line(*edge, "border")

    def mark(self, marks: Sequence[Mapping[str, Any]]) -> None:
        """The codes that were found."""
        for mark in marks:
            x, y = self.across.at(mark["x"]), self.upwards.at(mark["y"])
            self.canvas.dot(x, y, "dot ink", f"code found with {mark['mark']}", 3.5)
            self.canvas.text(x + 5, y - 4, mark["mark"][:1], "label ink")


def _contour(level: float) -> str:
    """The classes of a contour."""
    return "contour" + (" strong" if level == SHARE else " low" if level < SHARE else "")


def _scale(canvas: Canvas, scale: Axis, left: float, tall: float) -> None:
    """What the colours mean, with the levels of the contours."""
    up = colours(canvas, scale, left, TOP, tall, lambda value: f"{tick(100 * value)} %")
    for level in LEVELS:
        if scale.low <= level <= scale.high:
            canvas.path([(left, up.at(level)), (left + BAR, up.at(level))], _contour(level))


def _paths(plan: Plan, rows: Sequence[dict[str, Any]], title: str) -> list[Figure]:
    """One figure for each pair of codes."""
    steps, slot = [row for row in rows if "path" in row], slots([m.name for m in plan.methods])
    made = []
    for path in dict.fromkeys(row["path"] for row in steps):
        own = [row for row in steps if row["path"] == path]
        drawn = [
            Series(
                f"decoded as {method}", slot[method], False,
                tuple((row["share"], row["value"]) for row in own if row["method"] == method),
            )
            for method in dict.fromkeys(row["method"] for row in own)
        ]  # fmt: skip
        whole = f"{title}: {path}"
        data = tuple((row["method"], row["share"], round(row["value"], 4)) for row in own)
        picture = lines(whole, drawn, "share of the way", "test metric")
        columns = ("decoded as", "share", "metric")
        words = "Test metric along the line between the codes that two methods found."
        made.append(Figure(whole, words, picture, columns, data))
    return made
