"""The section of a report on intrinsic dimension."""

from collections.abc import Sequence
from typing import Any

from deltune.study import numbers
from deltune.study.page import html
from deltune.study.page.figures import Figure, gallery, lines, slots
from deltune.study.page.html import Cell
from deltune.study.page.svg import Series
from deltune.study.plan import MethodInfo
from deltune.study.summary import Row, Table
from deltune.subspace.dimension import crossing

SHARE = 0.9
_NOTE = f"""Test metric against the number of random directions that a model may move along, and the
intrinsic dimension d90: the fewest that reach {SHARE:.0%} of full fine-tuning of the same model,
among those that were tried, and between them on a logarithmic scale. The head is trained as it is,
beside them."""


def dimension(made: Sequence[Table]) -> str:
    """Where a study tries the random directions of one kind in several numbers: their curves."""
    figures, body = [], []
    for table in made:
        full = next((row for row in table.rows if row.method.kind == "full"), None)
        curves = _curves(table)
        if full is None or not curves or full.test <= 0:
            continue
        title = f"{table.task.title}, {table.model}"
        figures.append(_figure(title, table, full, curves))
        for name, rows in curves.items():
            scores = {_dimension(row.method): row.test for row in rows}
            found = crossing(scores, full.test, SHARE)
            most = max(scores)
            body.append(
                (
                    Cell(title),
                    Cell(name),
                    Cell(f"more than {most}", most + 1)
                    if found.first is None
                    else Cell(str(found.first), found.first),
                    Cell("–" if found.between is None else f"{found.between:.0f}",
                         found.between or found.first or most + 1),
                    Cell(numbers.metric(full.test), full.test),
                    Cell(numbers.metric(max(scores.values())), max(scores.values())),
                )
            )  # fmt: skip
    if not body:
        return ""
    columns = ("task", "directions", "d90", "between", "full fine-tuning", "best of them")
    return html.section(
        "Intrinsic dimension", html.paragraph(_NOTE, "note"), html.table(columns, body),
        gallery(figures),
    )  # fmt: skip


def _curves(table: Table) -> dict[str, list[Row]]:
    """What of a spec is not its dimension -> the rows of at least two dimensions, rising."""
    found: dict[str, list[Row]] = {}
    for row in table.rows:
        if row.method.kind == "intrinsic":
            found.setdefault(_kind(row.method), []).append(row)
    return {
        name: sorted(rows, key=lambda row: _dimension(row.method))
        for name, rows in found.items()
        if len(rows) > 1
    }


def _kind(method: MethodInfo) -> str:
    said: dict[str, Any] = method.spec
    where = said.get("where") or ""
    return f"{said['variant'].upper()}, {said['projection']}" + (f", {where}" if where else "")


def _dimension(method: MethodInfo) -> int:
    return int(method.spec["dimension"])


def _figure(title: str, table: Table, full: Row, curves: dict[str, list[Row]]) -> Figure:
    slot = slots(list(curves))
    drawn = [
        Series(name, slot[name], False, tuple(
            (float(_dimension(row.method)), row.test) for row in rows
        ))
        for name, rows in curves.items()
    ]  # fmt: skip
    ends = [min(x for s in drawn for x, _ in s.points), max(x for s in drawn for x, _ in s.points)]
    wanted = tuple((x, SHARE * full.test) for x in ends)
    drawn.append(Series(f"{SHARE:.0%} of full", len(curves), True, wanted))
    picture = lines(title, drawn, "directions (log)", f"test {table.task.metric}", log=True)
    data = tuple(
        (name, _dimension(row.method), round(row.test, 4), row.trainable)
        for name, rows in curves.items()
        for row in rows
    )
    columns = ("directions", "how many", f"test {table.task.metric}", "trained, with the head")
    return Figure(title, "Mean over seeds.", picture, columns, data)
