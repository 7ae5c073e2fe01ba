"""The section of a report on intrinsic dimension."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from deltune.study import numbers
from deltune.study.page import html
from deltune.study.page.figures import Figure, gallery, lines, slots
from deltune.study.page.html import Cell
from deltune.study.page.svg import Series
from deltune.study.plan import MethodInfo
from deltune.study.summary import Row, Table
from deltune.subspace.dimension import Crossing, crossing

SHARE = 0.9
_NOTE = f"""Test metric against the number of random directions that a model may move along, and the
intrinsic dimension d90: the fewest that reach {SHARE:.0%} of full fine-tuning of the same model,
among those that were tried, and between them on a logarithmic scale. The head is trained as it is,
beside them."""


@dataclass(frozen=True, slots=True)
class Found:
    """d90 of one kind of directions on a task."""

    task: str
    directions: str
    d90: Crossing
    most: int
    """The largest dimension that was tried."""
    full: float
    """Full fine-tuning."""
    best: float
    """The best of all dimensions."""

    @property
    def first(self) -> str:
        """d90 in words."""
        return f"more than {self.most}" if self.d90.first is None else str(self.d90.first)

    @property
    def between(self) -> str:
        """d90 between the dimensions, in words."""
        return "–" if self.d90.between is None else f"{self.d90.between:.0f}"


def crossings(made: Sequence[Table]) -> list[Found]:
    """d90 of every kind of directions that a study tries in several numbers, on each task."""
    return [
        Found(_title(table), name, crossing(scores, full.test, SHARE), max(scores), full.test,
              max(scores.values()))
        for table, full, curves in _tried(made)
        for name, rows in curves.items()
        for scores in [{_dimension(row.method): row.test for row in rows}]
    ]  # fmt: skip


def dimension(made: Sequence[Table]) -> str:
    """Where a study tries the random directions of one kind in several numbers: their curves."""
    body = [
        (
            Cell(one.task),
            Cell(one.directions),
            Cell(one.first, one.d90.first or one.most + 1),
            Cell(one.between, one.d90.between or one.d90.first or one.most + 1),
            Cell(numbers.metric(one.full), one.full),
            Cell(numbers.metric(one.best), one.best),
        )
        for one in crossings(made)
    ]
    if not body:
        return ""
    columns = ("task", "directions", "d90", "between", "full fine-tuning", "best of them")
    figures = [_figure(_title(table), table, full, curves) for table, full, curves in _tried(made)]
    return html.section(
        "Intrinsic dimension", html.paragraph(_NOTE, "note"), html.table(columns, body),
        gallery(figures),
    )  # fmt: skip


def _tried(made: Sequence[Table]) -> Iterator[tuple[Table, Row, dict[str, list[Row]]]]:
    """Tables with full fine-tuning and curves."""
    for table in made:
        full = next((row for row in table.rows if row.method.kind == "full"), None)
        curves = _curves(table)
        if full is not None and curves and full.test > 0:
            yield table, full, curves


def _title(table: Table) -> str:
    return f"{table.task.title}, {table.model}"


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
