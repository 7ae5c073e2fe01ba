"""Lines of equal value on a grid."""

from collections import defaultdict
from collections.abc import Iterator, Sequence

Point = tuple[float, float]
Node = tuple[int, int]
Edge = tuple[Node, Node]


def contours(
    xs: Sequence[float], ys: Sequence[float], values: Sequence[Sequence[float]], level: float
) -> list[list[Point]]:
    """The lines on which a function on a grid has the value c, by marching squares.

    On the edges of the grid the function is taken as linear: between neighbours p and q, of whose
    values f(p) and f(q) one alone is below c, the line crosses at

        p + (c - f(p)) / (f(q) - f(p)) (q - p)

    and within a cell straight pieces join the crossings. Of four crossings those around one corner
    belong together, so that the corners on the side of the cell's mean stay connected.

    Args:
        xs: of the columns, rising.
        ys: of the rows, rising.
        values: f, a row for each y.
        level: c.

    Returns:
        The points (x, y) of each line; a closed one ends at its first point.
    """
    links: dict[Edge, list[Edge]] = defaultdict(list)
    for row in range(len(ys) - 1):
        for column in range(len(xs) - 1):
            for one, two in _pieces(values, level, row, column):
                links[one].append(two)
                links[two].append(one)

    def crossing(edge: Edge) -> Point:
        (row, column), (up, right) = edge
        first, last = values[row][column], values[up][right]
        share = (level - first) / (last - first)
        x, y = xs[column], ys[row]
        return x + share * (xs[right] - x), y + share * (ys[up] - y)

    return [[crossing(edge) for edge in chain] for chain in _chains(links)]


def _pieces(
    values: Sequence[Sequence[float]], level: float, row: int, column: int
) -> Iterator[tuple[Edge, Edge]]:
    """The pairs of edges of a cell that a piece of the line joins."""
    round_ = [(row, column), (row, column + 1), (row + 1, column + 1), (row + 1, column)]
    around = [values[y][x] for y, x in round_]
    above = [value >= level for value in around]
    crossed = [
        (min(one, two), max(one, two))
        for at, (one, two) in enumerate(zip(round_, round_[1:] + round_[:1], strict=True))
        if above[at] != above[(at + 1) % 4]
    ]
    if len(crossed) == 4 and (sum(around) / 4 >= level) != above[0]:
        crossed = crossed[-1:] + crossed[:-1]
    yield from zip(crossed[::2], crossed[1::2], strict=True)


def _chains(links: dict[Edge, list[Edge]]) -> Iterator[list[Edge]]:
    """The crossings in the order in which they are joined; takes the links apart."""
    for start in sorted(links, key=lambda edge: len(links[edge])):  # open lines from their ends
        chain = [start]
        while links[chain[-1]]:
            after = links[chain[-1]].pop()
            links[after].remove(chain[-1])
            chain.append(after)
        if len(chain) > 1:
            yield chain
