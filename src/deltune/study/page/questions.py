"""The sections of a report on combination, scale, transfer and cost."""

from collections.abc import Callable, Sequence
from typing import Any

from deltune.study import numbers, statistics
from deltune.study.overview import Overview
from deltune.study.page import html
from deltune.study.page.figures import Figure, gallery, lines, ranked, slots, stages
from deltune.study.page.html import Cell
from deltune.study.page.svg import Canvas, Series
from deltune.study.plan import Plan
from deltune.study.state import State
from deltune.study.summary import Row, Table

BARE = "the model as it is"


def combination(state: State, made: Sequence[Table]) -> str:
    """Every subset of the parts at once, and every order of them, on each task."""
    subsets = [m.name for m in state.plan.methods if m.parts is not None and not m.stages]
    orders = [m.name for m in state.plan.methods if m.stages]
    if not subsets:
        return ""
    parts: list[str] = []
    for names, title in ((subsets, "At once"), (orders, "One after another")):
        tables = [(t, [row for row in t.rows if row.name in names]) for t in made]
        tables = [(table, rows) for table, rows in tables if len(rows) == len(names)]
        if not names or not tables:
            continue
        body = [
            (
                Cell(_place(table, state)),
                *html.metrics([row.test for row in rows], [row.test_spread for row in rows]),
            )
            for table, rows in tables
        ]
        means = [numbers.mean([rows[i].test for _, rows in tables]) for i in range(len(names))]
        body.append((Cell("Mean"), *html.metrics(means)))
        drawn = [_means(f"{title}: mean test metric", "test metric", tables, _test)]
        gaps = all(row.gap is not None for _, rows in tables for row in rows)
        if gaps:
            drawn.append(_means(f"{title}: mean gap", "|train − test|", tables, _gap))
        if names is orders:
            drawn += [stages(t, rows, f"{_place(t, state)}, stage by stage") for t, rows in tables]
        parts += [f"<h3>{title}</h3>", html.table(("task", *names), body), gallery(drawn)]
        if gaps:
            lines_ = [
                (
                    Cell(_place(table, state)),
                    *(Cell(numbers.metric(row.gap), row.gap) for row in rows),
                )
                for table, rows in tables
            ]
            parts += [
                f"<h3>{title}: generalisation gap, |train − test|</h3>",
                html.table(("task", *names), lines_),
            ]
    note = (
        "All parts of a subset are trained at once with one learning rate of its own; one after "
        "another, each stage trains its part alone, the earlier ones stay, and each has the rate "
        "and settings that it has alone. The first stage trains the task head."
    )
    return html.section("Combination", html.paragraph(note, "note"), *parts)


def _test(row: Row) -> tuple[float, float | None]:
    return row.test, row.test_spread


def _gap(row: Row) -> tuple[float, float | None]:
    return row.gap or 0.0, None


def _means(
    title: str, axis: str, tables: Sequence[tuple[Table, Sequence[Row]]],
    read: Callable[[Row], tuple[float, float | None]],
) -> Figure:  # fmt: skip
    """Each method's mean over the tasks, with its mean spread over seeds."""
    slot, drawn = slots([row.name for row in tables[0][1]]), []
    for index, row in enumerate(tables[0][1]):
        values, spreads = zip(*(read(rows[index]) for _, rows in tables), strict=True)
        known = [spread for spread in spreads if spread is not None]
        bar = numbers.mean(known) if len(known) == len(spreads) else None
        base = row.method.family == "baseline"
        drawn.append(Series(row.name, slot[row.name], base, ((numbers.mean(values), 0.0),), (bar,)))
    caption = f"Mean {axis} over {len(tables)} tasks"
    if drawn[0].bars[0] is not None:
        caption += "; bars: standard deviation over seeds, mean over the tasks"
    data = tuple((d.name, round(d.points[0][0], 4), round(d.bars[0] or 0.0, 4)) for d in drawn)
    return Figure(title, f"{caption}.", ranked(title, drawn, axis), ("method", axis, "bar"), data)


def scale(views: Sequence[Overview]) -> str:
    """Each method against the size of the model."""
    shared = [v for v in views if len(v.tables) == max(len(view.tables) for view in views)]
    if len(shared) < 2:
        return ""
    sizes = [_total(view) for view in shared]
    order = sorted(range(len(shared)), key=sizes.__getitem__)
    slot = slots([method.name for method in shared[0].methods])
    drawn, rows = [], []
    for method in shared[0].methods:
        name = method.name
        values = [shared[i].average(name) for i in order]
        steps = [shared[i].steps(name)[0] for i in order]
        points = tuple(zip([float(sizes[i]) for i in order], values, strict=True))
        drawn.append(Series(name, slot[name], method.family == "baseline", points))
        rows.append(
            (
                Cell(name),
                *(Cell(numbers.metric(value), value) for value in values),
                *(Cell(numbers.percent(step), step) for step in steps),
            )
        )
    names = [f"{shared[i].model} ({numbers.number(sizes[i])})" for i in order]
    columns = ("method", *names, *(f"{shared[i].model}: steps to 90 %" for i in order))
    title = "Mean test metric against parameters of the model"
    data = tuple((line.name, px, round(py, 4)) for line in drawn for px, py in line.points)
    picture = lines(title, drawn, "parameters (log)", "mean test metric", log=True)
    caption = f"Mean over {len(shared[0].tables)} tasks and all seeds."
    figure = Figure(title, caption, picture, ("method", "parameters", "metric"), data)
    return html.section("Scale", gallery([figure]), html.table(columns, rows))


def transfer(state: State) -> str:
    """What a delta of one task gives on the others without training, relative to their own."""
    plan, figures = state.plan, []
    for model in (m.name for m in plan.models):
        for method in plan.transferred:
            found = _transferred(state, model, method)
            if found:
                figures.append(_heat(plan, model, method, found))
    if not figures:
        return ""
    note = (
        "A delta that was trained on the task of its row (first seed), tried as it is on the test "
        "examples of the task of its column: its metric over that of the delta of the column's own "
        "task, both above chance. 1 is as good as its own; 0 is chance. Empty: the model cannot "
        "be asked (another label set), or the own delta is not above chance by two standard "
        "errors. Tasks are in the order of their types. The last row, where the model has no new "
        "head, is without any delta."
    )
    return html.section("Transfer", html.paragraph(note, "note"), gallery(figures))


def cost(state: State) -> str:
    """Times against input length and memory against batch size."""
    records = [state.records.get(run.digest()) for run in state.costs]
    rows = [(r.spec, row) for r in records if r and r.measures for row in r.measures]
    if not rows:
        return ""
    parts: list[str] = []
    for model in dict.fromkeys(run.model["name"] for run, _ in rows):
        own = [(run, row) for run, row in rows if run.model["name"] == model]
        parts.append(f"<h3>{html.escape(str(model))}</h3>")
        parts.append(gallery(_times(state.plan, [row for run, row in own if run.kind == "cost"])))
        parts.append(_memory(state.plan, [row for run, row in own if run.kind == "memory"]))
    note = (
        "Times of one input, in rounds in which every method has its turn: medians. Memory: the "
        "peak of training steps with AdamW in a process of its own, less what was there before "
        "them (model, libraries, delta)."
    )
    return html.section("Cost", html.paragraph(note, "note"), *parts)


def _times(plan: Plan, rows: Sequence[dict[str, Any]]) -> list[Figure]:
    made, slot = [], slots([method.name for method in plan.methods])
    for what in ("forward", "backward", "inference"):
        drawn = []
        for method in dict.fromkeys(row["method"] for row in rows):
            own = [r for r in rows if (r["method"], r["what"]) == (method, what)]
            points = tuple((float(r["length"]), 1e3 * r["seconds"]) for r in own)
            base = plan.method(method).family == "baseline"
            drawn.append(Series(method, slot[method], base, points))
        if not drawn:
            continue
        title = f"{what.capitalize()} time against input length"
        data = tuple(
            (r["method"], r["length"], *(round(1e3 * r[k], 3) for k in ("seconds", "low", "high")))
            for r in rows
            if r["what"] == what
        )
        picture = lines(title, drawn, "tokens (log)", "milliseconds", log=True)
        columns = ("method", "tokens", "ms", "lower quartile", "upper quartile")
        made.append(Figure(title, "Median of one input.", picture, columns, data))
    return made


def _memory(plan: Plan, rows: Sequence[dict[str, Any]]) -> str:
    sizes = sorted({row["batch_size"] for row in rows})
    used = {
        (r["method"], r["batch_size"]): max(0, r["peak_bytes"] - (r["resting_bytes"] or 0))
        for r in rows
        if r["peak_bytes"] is not None
    }
    names = list(dict.fromkeys(row["method"] for row in rows))
    kinds = {method.name: method.kind for method in plan.methods}
    full = next((name for name in names if kinds.get(name) == "full"), names[0] if names else "")
    body = []
    for name in names:
        values = [used.get((name, size)) for size in sizes]
        body.append(
            (
                Cell(name),
                *(Cell(numbers.size(value), value or 0) for value in values),
                *(
                    _saving(value, used.get((full, n)))
                    for value, n in zip(values, sizes, strict=True)
                ),
            )
        )
    columns = ("method", *(f"batch {size}" for size in sizes),
               *(f"batch {size}: less than {full}" for size in sizes))  # fmt: skip
    if not body:
        return ""
    return html.table(columns, body) + gallery([_peaks(plan, names, sizes, used)])


def _peaks(
    plan: Plan, names: Sequence[str], sizes: Sequence[int], used: dict[tuple[str, int], int]
) -> Figure:
    title, slot = "Memory against batch size", slots([method.name for method in plan.methods])
    data = tuple(
        (name, size, round(used[name, size] / 1e6, 1))
        for name in names for size in sizes if (name, size) in used
    )  # fmt: skip
    drawn = []
    for name in names:
        points = tuple((float(size), mb) for method, size, mb in data if method == name)
        if points:
            drawn.append(Series(name, slot[name], plan.method(name).family == "baseline", points))
    picture = lines(title, drawn, "batch size (log)", "megabytes", log=True)
    return Figure(title, "What training adds.", picture, ("method", "batch size", "MB"), data)


def _saving(value: float | None, full: float | None) -> Cell:
    if value is None or not full:
        return Cell("–", 0.0)
    return Cell(numbers.percent(1 - value / full), 1 - value / full)


def _transferred(state: State, model: str, method: str) -> dict[tuple[str, str], float | None]:
    """(source, target) -> relative performance above chance; None where it cannot be asked, or
    the target's own is not told from chance."""
    found: dict[tuple[str, str], float | None] = {}
    own: dict[str, float] = {}
    followers = [run for run in state.bare if run.model["name"] == model]
    for cell in state.cells:
        if (cell.model, cell.method) != (model, method):
            continue
        first = [r for r in state.results(cell) if r.spec.seed == state.plan.seeds[0]]
        for record in first:
            if record.result and record.result.test is not None:
                own[cell.task] = record.result.test
        followers += state.followers(cell)
    for run in followers:
        record = state.records.get(run.digest())
        for row in (record.measures if record else None) or ():
            found[row["source"] or BARE, row["target"]] = row["value"]
    relative: dict[tuple[str, str], float | None] = {}
    for (source, target), value in found.items():
        task, reference = state.plan.task(target), own.get(target)
        relative[source, target] = (
            None if value is None or reference is None
            else statistics.corrected(value, reference, task.chance, task.floor)
        )  # fmt: skip
    return relative


def _heat(
    plan: Plan, model: str, method: str, found: dict[tuple[str, str], float | None]
) -> Figure:
    inside = {name for pair in found for name in pair}
    tasks = sorted((t for t in plan.tasks if t.name in inside), key=lambda t: (t.type, t.name))
    sources = {task.name: task.title for task in tasks}
    if BARE in inside:
        sources[BARE] = BARE
    side, left, top = 34.0, 130.0, 110.0
    canvas = Canvas(f"Transfer of {method}", left + side * len(tasks) + 10,
                    top + side * len(sources) + 10)  # fmt: skip
    for column, target in enumerate(tasks):
        canvas.slanted(left + side * column + side / 2, top - 8, target.title, "label ink")
    for line, (source, shown) in enumerate(sources.items()):
        y = top + side * line
        canvas.text(left - 8, y + side / 2 + 4, shown[:18], "label ink", "end")
        for column, target in enumerate(tasks):
            x = left + side * column
            value = 1.0 if source == target.name else found.get((source, target.name))
            words = "–" if value is None else f"{value:.2f}"
            title = f"{shown} on {target.title}: {words}"
            canvas.heat(x, y, side - 2, value, words, title)
    data = tuple(
        (source, target, "" if value is None else round(value, 4))
        for (source, target), value in found.items()
    )
    title = f"{method} with {model}"
    caption = "Rows: trained on. Columns: tried on."
    return Figure(title, caption, canvas.render(), ("trained on", "tried on", "relative"), data)


def _place(table: Table, state: State) -> str:
    several = len(state.plan.models) > 1
    return f"{table.task.title}, {table.model}" if several else table.task.title


def _total(view: Overview) -> int:
    return round(numbers.mean(view.rows(view.methods[0].name)[0].over(lambda r: float(r.total))))
