"""A picture of how alike two deltas are."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from deltune.study.numbers import mean
from deltune.study.page.svg import Canvas

if TYPE_CHECKING:
    from torch import Tensor

    from deltune.merging.compare import Comparison, Difference

SIDE, GAP, LINE = 25.0, 46.0, 16.0
LETTER = 6.2
"""Width of one, about."""


def picture(found: "Comparison") -> str:
    """Fields of squares, roles by layers: the cosine, and the shares of directions that are read
    and written in common; then phi(i, j), the mean over all matrices."""
    places = [place for place in found.places if place.cosine is not None]
    matrices = [place for place in places if place.inputs is not None]
    fields: list[tuple[str, Sequence[Difference], Callable[[Difference], float]]] = [
        ("cosine of the changes", places, lambda place: place.cosine or 0.0),
        ("directions read in common", matrices, lambda place: _last(place.inputs)),
        ("directions written in common", matrices, lambda place: _last(place.outputs)),
    ]
    rows_of = _rows(places)
    columns = sorted({_layer(place) for place in places})
    rows = list(dict.fromkeys(rows_of.values()))
    sides = [place.inputs.shape[1] for place in matrices if place.inputs is not None]
    wide = max([len(columns) * SIDE, *(2 * _pitch(side) for side in sides)])
    label = 24 + LETTER * max((len(row) for row in rows), default=12)
    canvas = Canvas("How alike two deltas are", label + wide, 0)
    y = 14.0
    canvas.text(0, y, f"{_short(found.labels[0])} beside {_short(found.labels[1])}", "name ink")
    for title, shown, value in fields:
        if shown:
            y = _field(canvas, label, y + GAP, title, shown, rows, rows_of, columns, value)
    if matrices:
        y = _grids(canvas, label, y + GAP, matrices)
    canvas.height = y + 8
    return canvas.render()


def _field(
    canvas: Canvas, label: float, y: float, title: str, shown: "Sequence[Difference]",
    rows: Sequence[str], rows_of: Mapping[int, str], columns: Sequence[int],
    value: "Callable[[Difference], float]",
) -> float:  # fmt: skip
    canvas.text(0, y - LINE - 6, title, "name ink")
    mine = {rows_of[id(place)] for place in shown}
    here = [row for row in rows if row in mine]
    columns = [layer for layer in columns if any(_layer(place) == layer for place in shown)]
    canvas.text(label - 8, y - 5, "layer", "tick", "end")
    for number, layer in enumerate(columns):
        x = label + (number + 0.5) * SIDE
        canvas.text(x, y - 5, "–" if layer < 0 else f"{layer}", "tick", "middle")
    for number, row in enumerate(here):
        canvas.text(label - 8, y + (number + 0.65) * SIDE, row, "tick", "end")
    for place in shown:
        at = columns.index(_layer(place))
        found = value(place)
        words = f"{found:.2f}".replace("0.", ".").replace("1.00", "1")
        x, top = label + at * SIDE, y + here.index(rows_of[id(place)]) * SIDE
        canvas.heat(x, top, SIDE - 1, abs(found), words, f"{place.address}: {found:.4f}")
    return y + len(here) * SIDE


def _grids(canvas: Canvas, label: float, y: float, matrices: "Sequence[Difference]") -> float:
    """phi(i, j) of what is read and of what is written, the mean over all matrices with as many
    directions as most have."""
    shapes = [place.inputs.shape for place in matrices if place.inputs is not None]
    shape = max(set(shapes), key=shapes.count)
    n, m = shape
    for number, title in enumerate(("phi(i, j) of what is read", "of what is written")):
        grids = [p.outputs if number else p.inputs for p in matrices]
        alike = [grid for grid in grids if grid is not None and grid.shape == shape]
        lists = [grid.tolist() for grid in alike]
        x0 = label + number * _pitch(m)
        canvas.text(x0, y - LINE - 6, title, "name ink")
        for j in range(m):
            canvas.text(x0 + (j + 0.5) * SIDE, y - 5, f"{j + 1}", "tick", "middle")
        for i in range(n):
            canvas.text(x0 - 7, y + (i + 0.65) * SIDE, f"{i + 1}", "tick", "end")
            for j in range(m):
                value = mean([rows[i][j] for rows in lists])
                words = f"{value:.2f}".replace("0.", ".").replace("1.00", "1")
                said = f"i = {i + 1}, j = {j + 1}: {value:.4f}"
                canvas.heat(x0 + j * SIDE, y + i * SIDE, SIDE - 1, value, words, said)
    notes = ("rows: i", "columns: j", f"mean of {shapes.count(shape)} matrices")
    for number, note in enumerate(notes):
        canvas.text(0, y + (0.65 + 0.7 * number) * SIDE, note, "tick")
    return y + n * SIDE


def _last(phi: "Tensor | None") -> float:
    return 0.0 if phi is None else float(phi[-1, -1])


def _rows(places: "Sequence[Difference]") -> dict[int, str]:
    """The row of each place: its address without the layer, numbered where a layer has several."""
    times: Counter[str] = Counter()
    found = {}
    for place in places:
        times[place.address] += 1
        row = place.address.partition("[")[0] if place.layer is not None else place.address
        found[id(place)] = row if times[place.address] == 1 else f"{row} {times[place.address]}"
    return found


def _pitch(side: int) -> float:
    """From one grid of phi to the next."""
    return max(165.0, (side + 2) * SIDE)


def _layer(place: "Difference") -> int:
    return -1 if place.layer is None else place.layer


def _short(name: str) -> str:
    return name if len(name) < 40 else "…" + name[-38:]
