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
among those that were tried, and between them on a logarithmic scale. Above chance: the fewest that
reach {SHARE:.0%} of the way from guessing to full fine-tuning, where that is above guessing by two
standard errors. The head is trained as it is, beside them, so that no directions at all give what
training it alone gives: then d90 is 0."""


@dataclass(frozen=True, slots=True)
class Found:
    """d90 of one kind of directions on a task."""

    task: str
    directions: str
    d90: Crossing
    above_chance: Crossing | None
    """The same of metrics above chance; None where full fine-tuning is not told from it."""
    most: int
    """The largest dimension that was tried."""
    full: float
    """Full fine-tuning."""
    head: float | None
    """Training the head alone, which is dimension 0; None if the study has not tried it."""
    best: float
    """The best of all dimensions above 0."""

    def said(self, d90: Crossing | None) -> str:
        """One of its d90 in words, with the one between dimensions behind it."""
        if d90 is None:
            return "–"
        if d90.first is None:
            return f"more than {self.most}"
        return f"{d90.first}" + (f" ({d90.between:.0f})" if d90.between is not None else "")

    def sorted_by(self, d90: Crossing | None) -> float | None:
        """What one of its d90 is sorted by."""
        if d90 is None:
            return None
        if d90.first is None:
            return self.most + 1
        return d90.first if d90.between is None else d90.between


def crossings(made: Sequence[Table]) -> list[Found]:
    """d90 of every kind of directions that a study tries in several numbers, on each task."""
    return [
        _found(table, full, name, {_dimension(row.method): row.test for row in rows})
        for table, full, curves in _tried(made)
        for name, rows in curves.items()
    ]


def _found(table: Table, full: Row, directions: str, scores: dict[int, float]) -> Found:
    head, task = table.floor, table.task
    told, every = full.test > task.floor, dict(scores)
    if head:
        every[0] = head.test
    return Found(
        _title(table), directions, crossing(every, full.test, SHARE),
        crossing(every, full.test, SHARE, task.chance) if told else None,
        max(scores), full.test, head.test if head else None, max(scores.values()),
    )  # fmt: skip


def dimension(made: Sequence[Table]) -> str:
    """Where a study tries the random directions of one kind in several numbers: their curves."""
    body = [
        (
            Cell(one.task),
            Cell(one.directions),
            Cell(one.said(one.d90), one.sorted_by(one.d90)),
            Cell(one.said(one.above_chance), one.sorted_by(one.above_chance)),
            Cell(numbers.metric(one.full), one.full),
            Cell("–" if one.head is None else numbers.metric(one.head), one.head),
            Cell(numbers.metric(one.best), one.best),
        )
        for one in crossings(made)
    ]
    if not body:
        return ""
    columns = ("task", "directions", "d90 (between)", "above chance", "full fine-tuning",
               "head only", "best of them")  # fmt: skip
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
    said: dict[str, Any] = method.main
    parts = [said["variant"].upper(), said["projection"]]
    parts += ["global"] if said.get("scope") == "global" else []
    return ", ".join(parts + ([said["where"]] if said.get("where") else []))


def _dimension(method: MethodInfo) -> int:
    return int(method.main["dimension"])


def _figure(title: str, table: Table, full: Row, curves: dict[str, list[Row]]) -> Figure:
    slot = slots(list(curves))
    drawn = [
        Series(name, slot[name], False, tuple(
            (float(_dimension(row.method)), row.test) for row in rows
        ))
        for name, rows in curves.items()
    ]  # fmt: skip
    ends = [min(x for s in drawn for x, _ in s.points), max(x for s in drawn for x, _ in s.points)]
    for level, (name, value) in enumerate(_levels(table, full).items(), len(curves)):
        drawn.append(Series(name, level, True, tuple((x, value) for x in ends)))
    picture = lines(title, drawn, "directions (log)", f"test {table.task.metric}", log=True)
    data = tuple(
        (name, _dimension(row.method), round(row.test, 4), row.trainable)
        for name, rows in curves.items()
        for row in rows
    )
    columns = ("directions", "how many", f"test {table.task.metric}", "trained, with the head")
    return Figure(title, "Mean over seeds.", picture, columns, data)


def _levels(table: Table, full: Row) -> dict[str, float]:
    """What a curve is compared with: a name at the end of a line -> its height."""
    chance, head = table.task.chance, table.floor
    found = {f"{SHARE:.0%} of full": SHARE * full.test}
    if full.test > table.task.floor and chance > 0:
        found[f"{SHARE:.0%}, above chance"] = chance + SHARE * (full.test - chance)
    if head is not None:
        found["head only"] = head.test
    return found
