"""How methods perform and converge over many tasks."""

from deltune.study import numbers
from deltune.study.overview import Overview
from deltune.study.page import html
from deltune.study.page.figures import Figure, gallery, lines, slots
from deltune.study.page.html import Cell
from deltune.study.page.svg import Axis, Canvas, Series
from deltune.study.statistics import cliques

READS = 25
"""Points of a mean curve."""
SHOWN = 8
"""Tasks that are named where many are left out."""


def performance(view: Overview, title: str) -> str:
    """Summary, critical differences, types of tasks, and every task."""
    parts = [html.paragraph(_about(view), "note"), _summary(view)]
    if len(view.methods) > 2 and len(view.tables) > 1:
        parts.append(gallery([_differences(view)]))
    if len(view.types) > 1:
        parts += ["<h3>By type of task</h3>", _types(view)]
    parts += ["<h3>Every task</h3>", _tasks(view)]
    return html.section(title, *parts)


def convergence(view: Overview, title: str) -> str:
    """How soon each method is where it ends, and what lies under its curve."""
    slot, rows, drawn = slots([m.name for m in view.methods]), [], []
    for method in view.methods:
        share, seconds = view.steps(method.name)
        area = view.area(method.name)
        rows.append(
            (
                Cell(method.name),
                Cell(numbers.percent(share), share),
                Cell(numbers.seconds(seconds), seconds),
                Cell(numbers.metric(area), area),
            )
        )
        points = tuple(view.curve(method.name, READS))
        base = method.family == "baseline"
        drawn.append(Series(method.name, slot[method.name], base, points))
    columns = ("method", "steps to 90 % of its best", "seconds to it", "area under the curve")
    name = "Dev metric during training, mean over tasks"
    start, tasks = view.begun
    which = "all tasks"
    if len(tasks) < len(view.tasks):
        share = numbers.percent(start)
        which = (
            f"the {len(tasks)} of {len(view.tasks)} tasks first evaluated by {share} of the steps"
        )
    caption = (
        f"Mean dev metric over {which} and over seeds, against the share of the steps; each run's "
        "evaluations joined by lines. Dashed: baselines."
    )
    data = tuple(
        (line.name, round(px, 3), round(py, 4)) for line in drawn for px, py in line.points
    )
    picture = lines(name, drawn, "share of the steps", "dev metric", dots=False)
    figure = Figure(name, caption, picture, ("method", "share", "dev metric"), data)
    note = (
        "Steps are counted to the first evaluation at which a run's dev metric is at least 90 % of "
        "its own best, as a share of all its steps; the area is the mean height of the dev curve "
        "by the trapezoid rule. Means over tasks and seeds."
    )
    return html.section(
        title, html.paragraph(note, "note"), html.table(columns, rows), gallery([figure])
    )


def _about(view: Overview) -> str:
    text = (
        f"{len(view.tables)} tasks with {view.model}; every task counts alike. Rank 1 is the best."
    )
    if view.reference is not None:
        text += (
            " Of full: test metric over that of full fine-tuning, mean over tasks; above chance: "
            "the same after chance is subtracted from both, over the "
            f"{view.above_chance} tasks on which full fine-tuning is above chance by two standard "
            "errors. Wins: share of tasks better than full fine-tuning, ties half. p: permutation "
            "test of the difference to full fine-tuning over tasks, adjusted by Holm's rule; the "
            "interval draws tasks and seeds with replacement."
        )
    if view.left_out:
        some = ", ".join(view.left_out[:SHOWN])
        more = len(view.left_out) - SHOWN
        text += " Not finished by every method and left out: "
        text += f"{some} and {more} more." if more > 0 else f"{some}."
    return text


def _summary(view: Overview) -> str:
    slot, rows = slots([m.name for m in view.methods]), []
    for method in view.methods:
        name, mean = method.name, view.average(method.name)
        line = [
            named(name, slot[name], method.family == "baseline", method.text),
            Cell(numbers.metric(mean), mean),
            Cell(f"{view.ranks[name]:.2f}", view.ranks[name]),
        ]
        if view.reference is not None:
            line += _against_full(view, name)
        gap = view.gap(name)
        if gap is not None:
            line.append(Cell(numbers.metric(gap), gap))
        rows.append(line)
    columns = ["method", "mean", "rank"]
    if view.reference is not None:
        columns += ["of full", "of full above chance", "wins", "difference to full [95 %]", "p"]
    if any(len(row) > len(columns) for row in rows):
        columns.append("|train − test|")
    return html.table(columns, rows)


def _against_full(view: Overview, name: str) -> list[Cell]:
    """How a method does beside full fine-tuning."""
    found, p = view.comparisons.get(name), view.adjusted.get(name)
    cells = [_share(view.relative(name)), _share(view.corrected(name))]
    if found is None:
        return [*cells, Cell("–", 0.5), Cell("–", 0.0), Cell("–", 1.0)]
    interval = f"{found.difference:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"
    return [
        *cells,
        Cell(numbers.percent(found.wins), found.wins),
        Cell(interval, found.difference),
        Cell(f"{p:.3g}" if p is not None else "–", p if p is not None else 1.0),
    ]


def named(name: str, slot: int, baseline: bool, small: str = "") -> Cell:
    """The cell that names a method, in its colour, with its spec."""
    dashed = " base" if baseline else ""
    below = f"<small>{html.escape(small)}</small>" if small else ""
    body = (
        f'<span class="m key" data-m="{html.escape(name, quote=True)}">'
        f'<i class="swatch s{slot}{dashed}"></i>{html.escape(name)}{below}</span>'
    )
    return Cell(body, name, raw=True)


def _differences(view: Overview) -> Figure:
    """Average ranks on a line, with bars over methods that cannot be told apart."""
    names = [method.name for method in view.methods]
    ranks = [view.ranks[name] for name in names]
    distance, groups = view.critical_difference, cliques(ranks, view.critical_difference)
    order = sorted(range(len(names)), key=ranks.__getitem__)
    half = (len(order) + 1) // 2
    top = 46 + 9 * len(groups)
    canvas = Canvas("Critical differences", 560, top + 20 * half + 12)
    x = Axis(1, len(names), 150, 410)
    slot = slots(names)
    canvas.line(x.start, 30, x.end, 30, "axis")
    for rank in range(1, len(names) + 1):
        canvas.line(x.at(rank), 26, x.at(rank), 34, "axis")
        canvas.text(x.at(rank), 20, str(rank), "tick", "middle")
    for place, group in enumerate(groups):
        inside = [x.at(ranks[one]) for one in group]
        canvas.line(min(inside) - 3, 40 + 9 * place, max(inside) + 3, 40 + 9 * place, "clique")
    for place, one in enumerate(order):
        left = place < half
        y = top + 20 * (place if left else len(order) - 1 - place)
        edge = 140 if left else 420
        canvas.begin(names[one])
        css = f"leader s{slot[names[one]]}"
        canvas.path([(x.at(ranks[one]), 30), (x.at(ranks[one]), y), (edge, y)], css)
        words = f"{names[one]} {ranks[one]:.2f}"
        canvas.text(edge - 5 if left else edge + 5, y + 4, words, f"label s{slot[names[one]]}",
                    "end" if left else "start")  # fmt: skip
        canvas.end()
    statistic, p = view.friedman
    caption = (
        f"Average ranks over {len(view.tables)} tasks; a bar joins methods whose ranks differ by "
        f"less than the critical difference {distance:.2f} (Nemenyi, 5 %). Friedman test: "
        f"{statistic:.1f}, p = {p:.2g}."
    )
    data = tuple((names[one], round(ranks[one], 3)) for one in order)
    columns = ("method", "average rank")
    return Figure("Critical differences", caption, canvas.render(), columns, data)


def _types(view: Overview) -> str:
    names = [method.name for method in view.methods]
    rows = []
    for kind in view.types:
        values = [view.average(name, kind) for name in names]
        rows.append(
            (Cell(kind), Cell(str(view.count(kind)), view.count(kind)), *html.metrics(values))
        )
    return html.table(("type", "tasks", *names), rows)


def _tasks(view: Overview) -> str:
    names = [method.name for method in view.methods]
    rows = []
    for table in view.tables:
        task = table.task
        tests = [row.test for row in table.rows]
        spreads = [row.test_spread for row in table.rows]
        rows.append(
            (
                Cell(task.title),
                Cell(task.type),
                Cell(task.metric),
                Cell(numbers.metric(task.chance), task.chance),
                *html.metrics(tests, spreads),
            )
        )
    return html.table(("task", "type", "metric", "chance", *names), rows)


def _share(value: float | None) -> Cell:
    return Cell("–" if value is None else numbers.percent(value), value or 0.0)
