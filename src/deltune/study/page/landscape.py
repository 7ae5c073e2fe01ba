"""Figures of the plane of a task's codes and of the lines between them."""

from collections.abc import Mapping, Sequence
from typing import Any

from deltune.study.page.figures import Figure, lines, slots
from deltune.study.page.svg import Axis, Canvas, Series
from deltune.study.plan import Plan, Run

SHARE = 0.9
"""Of its own delta, from which on a method counts as well off in a landscape."""

LAND = f"""The plane through the codes that three methods found for a task (marked), each point
decoded by each method: its test metric over that of the method's own delta. Framed: where all of
them reach {SHARE:.0%}. Paths: the line between two codes; each curve names the method that
decodes it."""


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
    marks = [row for row in rows if "mark" in row]
    xs, ys = (sorted({row[axis] for row in grid}) for axis in ("x", "y"))
    value = {(r["method"], r["x"], r["y"]): r["value"] / own[r["method"]] for r in grid}
    joint = {(x, y) for x in xs for y in ys if all(value[m, x, y] >= SHARE for m in own)}
    least = min(value.values())
    side, gap, top = 150.0, 14.0, 26.0
    cell = side / len(xs)
    canvas = Canvas(title, (side + gap) * len(own) + 10, side + top + 10)
    for place, method in enumerate(own):
        left = 5 + place * (side + gap)
        across = Axis(xs[0], xs[-1], left + cell / 2, left + side - cell / 2)
        upwards = Axis(ys[0], ys[-1], top + side - cell / 2, top + cell / 2)
        canvas.text(left, top - 8, f"decoded as {method}", "label ink")
        for x in xs:
            for y in ys:
                words = f"{method} at ({x:.3g}, {y:.3g}): {value[method, x, y]:.3f}"
                shade = (value[method, x, y] - least) / ((1 - least) or 1.0)
                canvas.heat(across.at(x) - cell / 2, upwards.at(y) - cell / 2, cell, shade, "",
                            words)  # fmt: skip
        _frame(canvas, joint, xs, ys, across, upwards, cell)
        for mark in marks:
            words = f"code found with {mark['mark']}"
            canvas.dot(across.at(mark["x"]), upwards.at(mark["y"]), "dot ink", words, 3.5)
            canvas.text(across.at(mark["x"]) + 5, upwards.at(mark["y"]) - 4, mark["mark"][:1],
                        "label ink")  # fmt: skip
    area = len(joint) / (len(xs) * len(ys))
    caption = f"All methods reach {SHARE:.0%} of their own deltas on {area:.0%} of the area."
    data = tuple((m, round(x, 4), round(y, 4), round(v, 4)) for (m, x, y), v in value.items())
    return Figure(title, caption, canvas.render(), ("decoded as", "x", "y", "relative"), data)


def _frame(
    canvas: Canvas, inside: set[tuple[float, float]], xs: Sequence[float], ys: Sequence[float],
    across: Axis, upwards: Axis, cell: float,
) -> None:  # fmt: skip
    """The border of a set of grid points."""
    half = cell / 2
    for column, x in enumerate(xs):
        for row, y in enumerate(ys):
            if (x, y) not in inside:
                continue
            px, py = across.at(x), upwards.at(y)
            beside = {
                (-1, 0): (px - half, py - half, px - half, py + half),
                (1, 0): (px + half, py - half, px + half, py + half),
                (0, -1): (px - half, py + half, px + half, py + half),
                (0, 1): (px - half, py - half, px + half, py - half),
            }
            for (right, up), edge in beside.items():
                at, level = column + right, row + up
                known = 0 <= at < len(xs) and 0 <= level < len(ys)
                if not known or (xs[at], ys[level]) not in inside:
                    canvas.line(*edge, "border")


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
