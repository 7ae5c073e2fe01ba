"""The figures of a report, as inline SVG, each with the data it draws."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from deltune.study import numbers
from deltune.study.page import html, svg
from deltune.study.page.svg import Axis, Canvas, Series
from deltune.study.summary import Row, Table

SLOTS = 10
ROW, NAMES = 24, 128
"""Pixels of a row, and where what is drawn begins to the right of its names."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A picture, what it shows, and its data as a table."""

    title: str
    caption: str
    picture: str
    columns: tuple[str, ...]
    data: tuple[tuple[str | float, ...], ...]


def figures(table: Table) -> list[Figure]:
    """The figures of one table."""
    if not table.rows:
        return []
    made = [_curve_by_step(table), _curve_by_seconds(table), _by_parameters(table)]
    made.append(_bars(table, "Time to train", _seconds_of, "seconds in training steps"))
    if all(row.peak for row in table.rows):
        made.append(_bars(table, "Peak memory", _peak_of, "peak memory in training"))
    return made


def slots(names: Sequence[str]) -> dict[str, int]:
    """Each method's place in the palette: the same in every figure."""
    return {name: place % SLOTS for place, name in enumerate(names)}


def _curve_by_step(table: Table) -> Figure:
    caption = (
        f"Dev {table.task.metric} at each evaluation, mean over seeds. Dashed: baselines. "
        "Point at or tap a name to follow one method."
    )
    return _curves(table, "Dev metric against step", caption, "step", lambda point: point[0])


def stages(table: Table, rows: Sequence[Row], title: str) -> Figure:
    """Dev metric against step of some methods that are trained in stages."""
    caption = (
        "Dev metric at each evaluation, mean over seeds. Each stage trains its part alone, for the "
        "same number of steps, and begins with small ones again."
    )
    part = replace(table, rows=tuple(rows))
    return _curves(part, title, caption, "step", lambda point: point[0])


def _curve_by_seconds(table: Table) -> Figure:
    caption = (
        "The same against the time spent in training steps: what a method reaches in a given time."
    )
    return _curves(table, "Dev metric against time", caption, "seconds", lambda point: point[1])


def _curves(
    table: Table,
    title: str,
    caption: str,
    x_name: str,
    read: Callable[[Sequence[float]], float],
) -> Figure:
    slot = slots([row.name for row in table.rows])
    drawn = [
        Series(row.name, slot[row.name], row.method.family == "baseline", _mean_curve(row, read))
        for row in table.rows
    ]
    data = tuple(
        (row.name, record.run["seed"], point[0], round(point[1], 2), round(point[2], 4))
        for row in table.rows
        for record in row.records
        if record.result
        for point in record.result.curve
    )
    columns = ("method", "seed", "step", "seconds", f"dev {table.task.metric}")
    picture = lines(title, drawn, x_name, f"dev {table.task.metric}")
    return Figure(title, caption, picture, columns, data)


def lines(
    title: str,
    drawn: Sequence[Series],
    x_name: str,
    y_name: str,
    *,
    log: bool = False,
    dots: bool = True,
) -> str:
    """A picture of lines through points, each named at its end.

    Args:
        title: what it shows, for those who cannot see it.
        drawn: the lines, and the bars of their points.
        x_name: name of the axis to the right.
        y_name: name of the axis upwards.
        log: whether the axis to the right is logarithmic; it starts at 0 if not.
        dots: whether each point is marked.
    """
    canvas = Canvas(title)
    across = [px for line in drawn for px, _ in line.points]
    reach = [py + sign * (bar or 0.0) for line in drawn for (_, py), bar in _barred(line)
             for sign in (-1, 1)]  # fmt: skip
    low, high = (min(across) / 1.1, max(across) * 1.1) if log else (0, max(across) * 1.01)
    x = Axis(low, high, svg.LEFT, svg.WIDTH - svg.RIGHT, log)
    y = Axis(*svg.covering(reach), svg.HEIGHT - svg.BOTTOM, svg.TOP + 8)
    svg.frame(canvas, x, y, x_name, y_name)
    ends = svg.spaced(
        [y.at(line.points[-1][1]) for line in drawn], svg.LABEL, svg.TOP + 8, svg.HEIGHT - 34
    )
    for line, end in zip(drawn, ends, strict=True):
        _draw_line(canvas, line, x, y, end, dots)
    return canvas.render()


def ranked(title: str, drawn: Sequence[Series], x_name: str) -> str:
    """A picture of one value for each name, below each other, with what it varies by as a bar.

    Args:
        title: what it shows, for those who cannot see it.
        drawn: each with one point, whose first number is the value, and its bar.
        x_name: name of the axis.
    """
    below = ROW * len(drawn) + 6
    canvas = Canvas(title, height=below + 40)
    reach = [px + sign * (dot.bars[0] or 0.0) for dot in drawn for px, _ in dot.points
             for sign in (-1, 1)]  # fmt: skip
    x = Axis(*svg.covering(reach, 0.1), NAMES, svg.WIDTH - 60)
    for value in x.ticks():
        canvas.line(x.at(value), 4, x.at(value), below, "grid")
        canvas.text(x.at(value), below + 14, svg.tick(value), "tick", "middle")
    canvas.text((x.start + x.end) / 2, canvas.height - 5, x_name, "name", "middle")
    for index, dot in enumerate(drawn):
        middle, value, bar = 14 + ROW * index, dot.points[0][0], dot.bars[0]
        canvas.begin(dot.name)
        canvas.text(NAMES - 8, middle + 4, short(dot.name), "label ink", "end")
        if bar:
            canvas.line(
                x.at(value - bar), middle, x.at(value + bar), middle, svg.css_of(dot, "bar")
            )
        words = f"{dot.name}: {numbers.metric(value, bar)}"
        canvas.dot(x.at(value), middle, svg.css_of(dot, "dot"), words, 4.5)
        canvas.text(x.end + 8, middle + 4, numbers.metric(value), "label ink")
        canvas.end()
    return canvas.render()


def shown(figure: Figure) -> str:
    """A figure with its caption and its data one click away."""
    rows = [[html.plain(value) for value in line] for line in figure.data]
    return (
        f"<figure><h3>{html.escape(figure.title)}</h3>{figure.picture}"
        f"<figcaption>{html.escape(figure.caption)}</figcaption>"
        + html.details("Data of this figure", html.table(figure.columns, rows))
        + "</figure>"
    )


def gallery(made: Sequence[Figure], stacked: int | None = None) -> str:
    """Figures side by side; those from `stacked` on below each other in one place."""
    drawn = [shown(figure) for figure in made]
    if stacked is not None:
        drawn[stacked:] = ["<div>" + "".join(drawn[stacked:]) + "</div>"]
    return '<div class="figures">' + "".join(drawn) + "</div>"


def _draw_line(canvas: Canvas, line: Series, x: Axis, y: Axis, end: float, dots: bool) -> None:
    points = [(x.at(px), y.at(py)) for px, py in line.points]
    canvas.begin(line.name)
    canvas.path(points, svg.css_of(line, "curve"))
    for (value_x, value_y), bar in _barred(line) if dots else ():
        px, py = x.at(value_x), y.at(value_y)
        if bar:
            canvas.line(px, y.at(value_y - bar), px, y.at(value_y + bar), svg.css_of(line, "bar"))
        title = f"{line.name}: {numbers.metric(value_y, bar)} at {value_x:.4g}"
        canvas.dot(px, py, svg.css_of(line, "dot"), title, 2.6)
    last_x, last_y = points[-1]
    edge = svg.WIDTH - svg.RIGHT + 6
    canvas.path([(last_x, last_y), (edge, end), (edge + 5, end)], svg.css_of(line, "leader"))
    canvas.text(edge + 8, end + 3.8, short(line.name), svg.css_of(line, "label"))
    canvas.end()


def _barred(line: Series) -> Iterator[tuple[tuple[float, float], float | None]]:
    """Each point with half the length of its bar, if it has one."""
    return zip(line.points, line.bars or [None] * len(line.points), strict=True)


def _mean_curve(
    row: Row, read: Callable[[Sequence[float]], float]
) -> tuple[tuple[float, float], ...]:
    """The k-th evaluation of every seed, averaged, as far as all seeds go."""
    curves = [record.result.curve for record in row.records if record.result]
    return tuple(
        (
            numbers.mean([read(curve[k]) for curve in curves]),
            numbers.mean([curve[k][2] for curve in curves]),
        )
        for k in range(min(map(len, curves)))
    )


def _by_parameters(table: Table) -> Figure:
    slot = slots([row.name for row in table.rows])
    title = "Performance against trainable parameters"
    dots = [
        Series(
            row.name,
            slot[row.name],
            row.method.family == "baseline",
            ((max(1, row.trainable), row.test),),
            (row.test_spread,),
        )
        for row in table.rows
    ]
    canvas = Canvas(title)
    widest = [px for dot in dots for px, _ in dot.points]
    x = Axis(min(widest) / 2, max(widest) * 2, svg.LEFT, svg.WIDTH - 14, log=True)
    reach = [dot.points[0][1] + sign * (dot.bars[0] or 0.0) for dot in dots for sign in (-1, 1)]
    y = Axis(*svg.covering(reach, 0.1), svg.HEIGHT - svg.BOTTOM, svg.TOP + 8)
    svg.frame(canvas, x, y, "trainable parameters (log)", f"test {table.task.metric}")
    taken = [_area(x.at(dot.points[0][0]) - 4, y.at(dot.points[0][1]) + 4, 8.0) for dot in dots]
    for dot in dots:
        _draw_dot(canvas, dot, x, y, taken)
    caption = (
        f"Test {table.task.metric}, mean over seeds; bars show the spread. "
        "Up and to the left is better."
    )
    data = tuple(
        (row.name, row.trainable, round(row.test, 4), blank(row.test_spread)) for row in table.rows
    )
    columns = ("method", "trainable parameters", f"test {table.task.metric}", "spread")
    return Figure(title, caption, canvas.render(), columns, data)


Area = tuple[float, float, float, float]


def _draw_dot(canvas: Canvas, dot: Series, x: Axis, y: Axis, taken: list[Area]) -> None:
    (value_x, value_y), bar = dot.points[0], dot.bars[0]
    px, py = x.at(value_x), y.at(value_y)
    canvas.begin(dot.name)
    if bar:
        canvas.line(px, y.at(value_y - bar), px, y.at(value_y + bar), svg.css_of(dot, "bar"))
    title = f"{dot.name}: {numbers.metric(value_y, bar)} with {value_x:,.0f} parameters"
    canvas.dot(px, py, svg.css_of(dot, "dot"), title, 4.5)
    words = short(dot.name)
    left, bottom = _place(px, py, 6.2 * len(words), taken)
    canvas.text(left, bottom - 2, words, svg.css_of(dot, "label"))
    canvas.end()


def _place(px: float, py: float, width: float, taken: list[Area]) -> tuple[float, float]:
    """A free place for a label: the nearest of some around its dot, else the first."""
    spots = [
        (px + dx, py + dy)
        for dy in (6.0, -5.0, 17.0, -17.0, 29.0, -29.0)
        for dx in (8.0, -8.0 - width, -width / 2)
        if abs(dy) > 6 or dx != -width / 2
    ]
    inside = [
        (left, bottom)
        for left, bottom in spots
        if left > svg.LEFT and left + width < svg.WIDTH and bottom < svg.HEIGHT - svg.BOTTOM
    ]
    for left, bottom in inside:
        area = _area(left, bottom, width)
        if not any(_overlap(area, other) for other in taken):
            taken.append(area)
            return left, bottom
    return (inside or spots)[0]


def _area(left: float, bottom: float, width: float) -> Area:
    return left, bottom - 11, left + width, bottom


def _overlap(a: Area, b: Area) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


@dataclass(frozen=True, slots=True)
class _Bar:
    value: float
    base: float
    words: str


def _seconds_of(row: Row) -> _Bar:
    return _Bar(row.seconds, 0.0, numbers.seconds(row.seconds))


def _peak_of(row: Row) -> _Bar:
    return _Bar(row.peak or 0.0, row.resting or 0.0, numbers.size(row.peak))


def _bars(table: Table, title: str, read: Callable[[Row], _Bar], axis: str) -> Figure:
    slot = slots([row.name for row in table.rows])
    canvas = Canvas(title, height=ROW * len(table.rows) + 12)
    bars = [read(row) for row in table.rows]
    x = Axis(0, max(bar.value for bar in bars), NAMES, svg.WIDTH - 74)
    for index, (row, bar) in enumerate(zip(table.rows, bars, strict=True)):
        top = 6 + ROW * index
        css = f"s{slot[row.name]}" + (" base" if row.method.family == "baseline" else "")
        canvas.begin(row.name)
        canvas.text(NAMES - 8, top + 14, short(row.name), "label ink", "end")
        words = f"{row.name}: {bar.words}"
        canvas.box(x.start, top + 3, x.at(bar.value) - x.start, 15, f"fill {css}", words)
        if 0 < bar.base < bar.value:
            canvas.box(x.start, top + 3, x.at(bar.base) - x.start, 15, "rest", "before training")
        canvas.text(x.at(bar.value) + 6, top + 14, bar.words, "label ink")
        canvas.end()
    caption = f"Mean {axis} over seeds."
    if any(bar.base for bar in bars):
        caption += " The paler part is there before training: interpreter, libraries and model."
    data = tuple(
        (row.name, round(bar.value, 2), round(bar.base, 2))
        for row, bar in zip(table.rows, bars, strict=True)
    )
    return Figure(title, caption, canvas.render(), ("method", axis, "before training"), data)


def short(name: str, most: int = 19) -> str:
    """A name as far as there is room for it."""
    return name if len(name) <= most else name[: most - 1] + "…"


def blank(value: float | None) -> str | float:
    """A value of a figure's data, to four digits; nothing where there is none."""
    return "" if value is None or math.isnan(value) else round(value, 4)
