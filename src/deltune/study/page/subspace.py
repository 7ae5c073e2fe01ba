"""The section of a report on subspaces: codes, transfer, reconstruction and landscapes."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deltune.study import numbers
from deltune.study.joint import DRAWN
from deltune.study.page import html
from deltune.study.page.figures import Figure, gallery, lines, slots
from deltune.study.page.html import Cell
from deltune.study.page.svg import Axis, Canvas, Series
from deltune.study.plan import Plan, Run, SubspaceInfo
from deltune.study.state import State

SHARE = 0.9
"""Of its own delta, from which on a method counts as well off in a landscape."""


@dataclass(frozen=True)
class Scored:
    """What codes of one space gave on the unseen tasks: (task, source, decoder) -> relative
    performance, plain and above chance, mean over seeds; chance as None where a delta of its own is
    not above it."""

    plain: dict[tuple[str, str, str], float]
    above: dict[tuple[str, str, str], float | None]

    def mean(self, of: Callable[[str, str], bool], above: bool = False) -> float:
        """Over all tasks, and the pairs (source, decoder) that are asked for."""
        table = self.above if above else self.plain
        values = [v for (_, s, d), v in table.items() if v is not None and of(s, d)]
        return numbers.mean(values)


def scored(state: State, space: Run) -> Scored:
    """The relative performance of every finished code of a space: its test metric over the mean
    of the decoding method's own deltas on the task."""
    plain: dict[tuple[str, str, str], list[float]] = {}
    above: dict[tuple[str, str, str], list[float | None]] = {}
    for run in state.joint.codes(space):
        record = state.records.get(run.digest())
        own = state.joint.references(space.model["name"], run.task["name"])
        chance = state.plan.task(run.task["name"]).chance
        for row in (record.measures if record else None) or ():
            if "decoder" not in row or not own[row["decoder"]]:
                continue
            reference = numbers.mean(own[row["decoder"]])
            key = run.task["name"], run.method, row["decoder"]
            plain.setdefault(key, []).append(row["value"] / reference if reference else math.nan)
            sure = reference > chance
            over = (row["value"] - chance) / (reference - chance) if sure else None
            above.setdefault(key, []).append(over)
    means = {key: numbers.mean([v for v in values if v is not None]) if None not in values else None
             for key, values in above.items()}  # fmt: skip
    return Scored({key: numbers.mean(values) for key, values in plain.items()}, means)


def subspace(state: State) -> str:
    """What the spaces hold, what is reached in them, and what passes from method to method."""
    sub = state.plan.subspace
    spaces = [run for run in state.joint.spaces() if _measures(state, run)]
    if sub is None or not spaces:
        return ""
    found = {run.digest(): scored(state, run) for run in spaces}
    parts = [
        html.paragraph(_NOTE, "note"),
        "<h3>Codes and transfer</h3>",
        _summary(spaces, found, sub),
        gallery(_by_dimension(spaces, found, sub)),
        "<h3>Reconstruction</h3>",
        html.paragraph(_HELD, "note"),
        _reconstruction(state, spaces),
    ]
    for run in spaces:
        if found[run.digest()].plain:
            parts.append(html.details(f"{_name(run)}: every task", *_tasks(state, run, found, sub)))
    drawn = [figure for run in spaces for figure in _landscapes(state, run)]
    if drawn:
        parts += ["<h3>Landscapes</h3>", html.paragraph(_LAND, "note"), gallery(drawn)]
    return html.section("Subspaces", *parts)


_NOTE = """The deltas of all other tasks span a space of few numbers that all methods share; on
each unseen task the code alone was trained with one method (its rate chosen on dev) and then
decoded by every method without training. Relative: the test metric over that of the decoding
method's own deltas of the task, mean over tasks and seeds; above chance, both less the metric of
guessing (tasks on which the own delta is not above it are left out). Random spaces know nothing of
the tasks: the control."""
_HELD = """How far a delta is from its decoded code, || D - U I || / || D ||, beside what no space
of so many numbers can go below on the tasks that it was made of, and the test metric of the
decoded code over that of the delta itself (first seed)."""
_LAND = f"""The plane through the codes that three methods found for a task (marked), each point
decoded by each method: its test metric over that of the method's own delta. Framed: where all of
them reach {SHARE:.0%}. Paths: the line between two codes, decoded by both methods."""


def _summary(spaces: Sequence[Run], found: dict[str, Scored], sub: SubspaceInfo) -> str:
    columns = ("space", "numbers", *sub.methods, "mean", "mean above chance", "transfer",
               "transfer above chance")  # fmt: skip
    body = []
    for run in spaces:
        one = found[run.digest()]
        if not one.plain:
            continue
        own = [one.mean(lambda s, d, m=m: s == d == m) for m in sub.methods]
        body.append(
            (
                Cell(_title(run)),
                Cell(str(run.settings["dimension"]), run.settings["dimension"]),
                *map(_share, own),
                _share(one.mean(_same)),
                _share(one.mean(_same, above=True)),
                _share(one.mean(_other)),
                _share(one.mean(_other, above=True)),
            )
        )
    return html.table(columns, body) if body else ""


def _tasks(state: State, space: Run, found: dict[str, Scored], sub: SubspaceInfo) -> Iterable[str]:
    one = found[space.digest()]
    pairs = [(m, m) for m in sub.methods]
    pairs += [(s, d) for s in sub.methods for d in sub.methods if s != d]
    columns = ("task", *(s if s == d else f"{s} to {d}" for s, d in pairs))
    for title, table in (("Relative", one.plain), ("Above chance", one.above)):
        body = []
        for task in sub.unseen:
            values = [table.get((task, *pair)) for pair in pairs]
            if any(value is not None for value in values):
                body.append((Cell(state.plan.task(task).title), *map(_share, values)))
        if body:
            yield f"<h4>{title}</h4>"
            yield html.table(columns, body)


def _reconstruction(state: State, spaces: Sequence[Run]) -> str:
    columns = ("space", "numbers", "method", "bound", "error, seen", "error, unseen",
               "metric, seen", "metric, unseen")  # fmt: skip
    body = []
    for run in spaces:
        rows = _measures(state, run)
        for method in dict.fromkeys(row["method"] for row in rows):
            own = [row for row in rows if row["method"] == method]
            errors, kept = [], []
            for which in ("seen", "unseen"):
                some = [row for row in own if row["which"] == which]
                errors.append(numbers.mean([row["error"] for row in some]))
                kept.append(numbers.mean(list(_kept(state, run, some))))
            body.append(
                (
                    Cell(_title(run)),
                    Cell(str(run.settings["dimension"]), run.settings["dimension"]),
                    Cell(method),
                    *(Cell(f"{v:.3f}", v) for v in (own[0]["bound"], *errors)),
                    *map(_share, kept),
                )
            )
    return html.table(columns, body)


def _kept(state: State, space: Run, rows: Iterable[dict[str, Any]]) -> Iterable[float]:
    """The metric of a decoded code over that of the delta that it is the code of."""
    for row in rows:
        own = state.joint.references(space.model["name"], row["task"])[row["method"]]
        if own and own[0]:
            yield row["value"] / own[0]


def _by_dimension(
    spaces: Sequence[Run], found: dict[str, Scored], sub: SubspaceInfo
) -> list[Figure]:
    if all(len(dimensions) < 2 for dimensions in sub.spaces.values()):
        return []
    made, slot = [], slots(list(sub.spaces))
    for title, of in (("Codes against dimension", _same), ("Transfer against dimension", _other)):
        drawn = []
        for how in sub.spaces:
            own = sorted(
                (run for run in spaces if run.settings["how"] == how),
                key=lambda run: run.settings["dimension"],
            )
            points = tuple(
                (float(run.settings["dimension"]), found[run.digest()].mean(of, above=True))
                for run in own
            )
            points = tuple(point for point in points if not math.isnan(point[1]))
            if points:
                drawn.append(Series(how, slot[how], how in DRAWN, points))
        if drawn:
            data = tuple((s.name, x, round(y, 4)) for s in drawn for x, y in s.points)
            picture = lines(title, drawn, "numbers of a code (log)", "relative, above chance",
                            log=True)  # fmt: skip
            caption = "Mean over tasks, methods and seeds. Dashed: random spaces."
            made.append(Figure(title, caption, picture, ("space", "numbers", "relative"), data))
    return made


def _landscapes(state: State, space: Run) -> list[Figure]:
    made = []
    for run in state.joint.landscapes(space):
        rows = _measures(state, run)
        if not rows:
            continue
        title = state.plan.task(run.task["name"]).title
        own = {target["method"]: target["own"] for target in run.targets or ()}
        made.append(plane_figure(rows, own, f"{title}: {_name(space)}"))
        made += _paths(state.plan, rows, title)
    return made


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
    steps = [row for row in rows if "path" in row]
    if not steps:
        return []
    names = list(dict.fromkeys((row["path"], row["method"]) for row in steps))
    slot = slots([method.name for method in plan.methods])
    drawn = [
        Series(f"{path}: {method}"[:40], slot[method], False, tuple(
            (row["share"], row["value"])
            for row in steps
            if (row["path"], row["method"]) == (path, method)
        ))
        for path, method in names
    ]  # fmt: skip
    whole = f"{title}: between the codes"
    data = tuple((r["path"], r["method"], r["share"], round(r["value"], 4)) for r in steps)
    picture = lines(whole, drawn, "share of the way", "test metric")
    columns = ("path", "decoded as", "share", "metric")
    return [Figure(whole, "Test metric along the line between two codes.", picture, columns, data)]


def _measures(state: State, run: Run) -> list[dict[str, Any]]:
    record = state.records.get(run.digest())
    return (record.measures if record else None) or []


def _same(source: str, decoder: str) -> bool:
    return source == decoder


def _other(source: str, decoder: str) -> bool:
    return source != decoder


def _share(value: float | None) -> Cell:
    missing = value is None or math.isnan(value)
    return Cell("–", -math.inf, "num") if missing else Cell(f"{100 * value:.1f} %", value)


def _title(run: Run) -> str:
    return f"{run.settings['how']}, {run.model['name']}"


def _name(run: Run) -> str:
    return f"{run.settings['how']} space of {run.settings['dimension']}"
