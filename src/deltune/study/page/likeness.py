"""Which codes of a space point in similar directions: a table of all spaces, and a map of each."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, combinations_with_replacement

from deltune.study import numbers
from deltune.study.page import html
from deltune.study.page.figures import Figure, blank, gallery, short
from deltune.study.page.html import Cell
from deltune.study.page.subspace_scores import measures
from deltune.study.page.subspace_tables import decimal, name_of, title_of
from deltune.study.page.svg import BAR, WIDTH, Axis, Canvas, colours, tick
from deltune.study.plan import Run
from deltune.study.state import State

Vector = Sequence[float]
Matrix = Sequence[Vector]
Codes = Mapping[tuple[str, int], Vector]
"""Of a task, by method and seed."""

SCALE = Axis(-1.0, 1.0, 0.0, 1.0)  # cosine -> strength of the colour
LEAST, MOST, WORDS = 12.0, 40.0, 26.0
"""Pixels: the least and most of a cell's side, and from which on it holds its number."""
LETTER, GAP, EDGE = 6.4, 10.0, 34.0
"""Pixels: a letter's width, what is beside names and the map, and the ticks of the scale."""

ALIKE = """Whether codes of similar tasks point in similar directions (Qin et al. 2021,
arXiv:2110.07867): cos(u, v) = <u, v> / (|u| |v|) of two codes, each trained on its own. Same task:
two seeds of one method, mean over tasks. Same type, other types: codes of two tasks by one method,
any seeds, mean over pairs of tasks. Other methods: two methods on one task and seed, mean over
tasks: how near codes are to what their decoders find themselves. Random directions have 0, give or
take 1 / sqrt(numbers). The maps' tasks are in the order of average linkage on 1 - cosine."""


@dataclass(frozen=True, slots=True)
class Alike:
    """Mean cosines of the codes of one space; NaN where there are no two codes to compare."""

    tasks: tuple[str, ...]
    cosines: Matrix
    """Of two tasks; of a task with itself, between seeds."""
    methods: tuple[float, ...]
    """Of two methods on a task and seed, for each task."""


def likeness(state: State, spaces: Sequence[Run]) -> str:
    """The table and the maps; nothing where no space has two tasks with codes of two numbers."""
    found = [(run, alike(codes)) for run in spaces if len(codes := _codes(state, run)) > 1]
    columns = ("space", "numbers", "same task", "same type", "other types", "other methods")
    body, maps = [], []
    for run, one in found:
        kinds = [state.plan.task(task).type for task in one.tasks]
        pairs = list(combinations(range(len(kinds)), 2))
        same = [one.cosines[a][b] for a, b in pairs if kinds[a] == kinds[b]]
        other = [one.cosines[a][b] for a, b in pairs if kinds[a] != kinds[b]]
        own = [row[place] for place, row in enumerate(one.cosines)]
        head = Cell(title_of(state, run)), html.plain(run.settings["dimension"])
        body.append((*head, *map(decimal, map(_mean, (own, same, other, one.methods)))))
        names = [state.plan.task(task).title for task in one.tasks]
        maps.append(cosine_figure(names, one.cosines, f"Cosine of codes: {name_of(state, run)}"))
    return html.table(columns, body) + gallery(maps) if body else ""


def _codes(state: State, space: Run) -> dict[str, dict[tuple[str, int], Vector]]:
    """task -> (method, seed) -> code; none where codes have one number, and thus no direction."""
    found: dict[str, dict[tuple[str, int], Vector]] = {}
    for run in state.joint.codes(space) if space.settings["dimension"] > 1 else ():
        for row in measures(state, run):
            if any(row.get("code", ())):
                found.setdefault(run.task["name"], {})[run.method, run.seed] = row["code"]
    return found


def alike(codes: Mapping[str, Codes]) -> Alike:
    """The mean cosines of the codes of tasks, none of which is zero."""
    each = codes.values()
    cosines = [[_mean(_by_method(one, other)) for other in each] for one in each]
    return Alike(tuple(codes), cosines, tuple(_mean(_by_seed(own)) for own in each))


def _by_method(one: Codes, other: Codes) -> Iterator[float]:
    """The cosines of all pairs of one method, without those of a code and itself."""
    for (method, seed), u in one.items():
        for (same, again), v in other.items():
            if method == same and (one is not other or seed != again):
                yield _cosine(u, v)


def _by_seed(own: Codes) -> Iterator[float]:
    """Those of two methods with one seed."""
    for ((method, seed), u), ((other, same), v) in combinations(own.items(), 2):
        if seed == same and method != other:
            yield _cosine(u, v)


def merges(far: Matrix) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The pairs of clusters that average linkage joins, one after the other, as members.

    The two nearest are joined first, of equally near ones the eldest: far(A, B) is the mean of
    `far[a][b]` over all a of A and b of B, without those that are NaN.
    """
    clusters: list[tuple[int, ...]] = [(place,) for place in range(len(far))]
    found = []
    while len(clusters) > 1:
        one, other = min(combinations(clusters, 2), key=lambda pair: _apart(far, *pair))
        found.append((one, other))
        clusters = [some for some in clusters if some not in (one, other)] + [one + other]
    return found


def _apart(far: Matrix, one: Sequence[int], other: Sequence[int]) -> float:
    found = _mean(far[a][b] for a in one for b in other)
    return math.inf if math.isnan(found) else found


def cosine_figure(names: Sequence[str], cosines: Matrix, title: str) -> Figure:
    """The map of two tasks or more, those that are alike beside each other."""
    one, other = merges([[1 - value for value in row] for row in cosines])[-1]
    order = one + other
    edge = GAP + LETTER * max(len(short(name)) for name in names)
    side = min(MOST, max(LEAST, (WIDTH - edge - EDGE) / len(order)))
    tall = side * len(order)
    canvas = Canvas(title, max(WIDTH, edge + tall + GAP + BAR + EDGE), edge + tall + GAP)
    for line, a in enumerate(order):
        middle = edge + side * (line + 0.5)
        canvas.text(edge - GAP / 2, middle + 4, short(names[a]), "label ink", "end")
        canvas.slanted(middle + 4, edge - GAP / 2, short(names[a]), "label ink", 90)
        for column, b in enumerate(order):
            value, at = cosines[a][b], (edge + side * column, edge + side * line)
            said = f"{names[a]} and {names[b]}: {numbers.metric(value)}"
            if not math.isnan(value):
                words = f"{value:z.2f}" if side >= WORDS else ""
                canvas.heat(*at, side, SCALE.at(value), words, said)
    colours(canvas, SCALE, edge + tall + GAP, edge, tall, tick)
    pairs = combinations_with_replacement(order, 2)
    data = tuple((names[a], names[b], blank(cosines[a][b])) for a, b in pairs)
    caption = "Mean cosine between the codes of two tasks; of one task, between seeds."
    return Figure(title, caption, canvas.render(), ("task", "other task", "cosine"), data)


def _cosine(one: Vector, other: Vector) -> float:
    size = math.hypot(*one) * math.hypot(*other)
    return sum(a * b for a, b in zip(one, other, strict=True)) / size


def _mean(values: Iterable[float]) -> float:
    """Of those that are known."""
    return numbers.mean([value for value in values if not math.isnan(value)])
