"""The section of a report on subspaces: codes, transfer, reconstruction."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deltune.study import numbers
from deltune.study.joint import DRAWN
from deltune.study.page import html
from deltune.study.page.figures import Figure, gallery, lines, slots
from deltune.study.page.html import Cell
from deltune.study.page.landscape import LAND, landscape
from deltune.study.page.svg import Series
from deltune.study.plan import Cell as Place
from deltune.study.plan import Run, SubspaceInfo
from deltune.study.state import State
from deltune.study.statistics import corrected

Choice = Callable[[str, str], bool]
"""Whether a pair (source, decoder) is asked for."""


@dataclass(frozen=True)
class Scored:
    """What codes of one space gave on the unseen tasks: (task, source, decoder) -> relative
    performance, plain and above chance, mean over seeds; the latter None where a delta of its own
    is not told from chance (`TaskInfo.floor`)."""

    plain: dict[tuple[str, str, str], float]
    above: dict[tuple[str, str, str], float | None]

    def mean(self, of: Choice, above: bool = False) -> float:
        """Over all tasks, and the pairs (source, decoder) that are asked for."""
        table = self.above if above else self.plain
        values = [v for (_, s, d), v in table.items() if v is not None and of(s, d)]
        return numbers.mean(values)


def scored(state: State, space: Run) -> Scored:
    """The relative performance of every finished code of a space: its test metric over the mean
    of the decoding method's own deltas on the task."""
    return _relative(
        state,
        space.model["name"],
        (
            ((run.task["name"], run.method, row["decoder"]), row["value"])
            for run in state.joint.codes(space)
            for row in _measures(state, run)
            if "decoder" in row
        ),
    )


def untrained(state: State, start: Run) -> Scored:
    """The same of the deltas as they are before any training: of the code zero of all spaces."""
    rows = _measures(state, start)
    found = (((row["task"], row["method"], row["method"]), row["value"]) for row in rows)
    return _relative(state, start.model["name"], found)


def _relative(
    state: State, model: str, values: Iterable[tuple[tuple[str, str, str], float]]
) -> Scored:
    """Of metrics by (task, source, decoder), those on unseen tasks over the decoder's own."""
    plain: dict[tuple[str, str, str], list[float]] = {}
    above: dict[tuple[str, str, str], list[float | None]] = {}
    unseen = state.plan.subspace.unseen if state.plan.subspace else ()
    for key, value in values:
        name, _, decoder = key
        own = state.joint.references(model, name)[decoder] if name in unseen else ()
        if own:
            reference, task = numbers.mean(own), state.plan.task(name)
            plain.setdefault(key, []).append(value / reference if reference else math.nan)
            above.setdefault(key, []).append(corrected(value, reference, task.chance, task.floor))
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
    starts = {run.model["name"]: untrained(state, run) for run in state.joint.starts()}
    parts = [
        html.paragraph(_NOTE, "note"),
        "<h3>Codes and transfer</h3>",
        _summary([*_untrained(starts), *_trained(spaces, found)], sub),
        gallery(_by_dimension(state, spaces, found, starts)),
        "<h3>Reconstruction</h3>",
        html.paragraph(_HELD, "note"),
        _reconstruction(state, spaces),
    ]
    if sub.tune_seen or sub.refine:
        rows = [row for run in spaces for row in sets(state, run)]
        parts += ["<h3>Seen and unseen tasks</h3>", html.paragraph(_SETS, "note"), _five(rows)]
    for model, one in starts.items():
        if one.plain:
            name = f"before training, {model}: every task"
            pairs = [(method, method) for method in sub.methods + sub.decoded]
            parts.append(html.details(name, *_tasks(state, one, pairs, sub)))
    for run in spaces:
        if found[run.digest()].plain:
            methods = sub.decoders(run.settings["how"])
            pairs = [(m, m) for m in methods]
            pairs += [(s, d) for s in methods for d in methods if s != d]
            name = f"{_name(state, run)}: every task"
            parts.append(html.details(name, *_tasks(state, found[run.digest()], pairs, sub)))
    drawn = [
        figure
        for run in spaces
        for land in state.joint.landscapes(run)
        for figure in landscape(state.plan, land, _measures(state, land), _name(state, run))
    ]
    if drawn:
        parts += ["<h3>Landscapes</h3>", html.paragraph(LAND, "note"), gallery(drawn)]
    return html.section("Subspaces", *parts)


_NOTE = """The deltas of all other tasks span a space of few numbers that all methods share; on
each unseen task the code alone was trained with one method (its rate chosen on dev) and then
decoded by every method without training. Relative: the test metric over that of the decoding
method's own deltas of the task, mean over tasks and seeds; above chance, both less the metric of
guessing (tasks on which the own delta is not above it by two standard errors are left out).
Random spaces know nothing of the tasks: the control. Before training: the deltas as they begin,
which is the code zero of every space; what a code adds to it is what it found."""
_HELD = """How far a delta is from its decoded code, || D - U I || / || D ||, beside what no space
of so many numbers can go below on the tasks that it was made of; and kept: the test metric of the
decoded code above guessing over that of the delta itself (first seed), mean over tasks on which the
delta is above guessing by two standard errors."""


_SETS = """Decoded: the code of a delta, by the encoder, not trained. Trained: the code alone, found
anew; with other examples on the tasks of the space's other seeds in a few-shot study. Refined: the
delta itself, trained as on its own but from what the trained code means. Means over tasks; the
deviation is that of the test metric over seeds, mean over tasks."""


def _untrained(starts: Mapping[str, Scored]) -> list[tuple[str, int, Scored]]:
    """Title, numbers and scores of what was not trained."""
    return [(f"before training, {model}", 0, one) for model, one in starts.items()]


def _trained(spaces: Sequence[Run], found: dict[str, Scored]) -> list[tuple[str, int, Scored]]:
    """The same of the spaces."""
    return [(_title(run), run.settings["dimension"], found[run.digest()]) for run in spaces]


def _summary(every: Sequence[tuple[str, int, Scored]], sub: SubspaceInfo) -> str:
    methods = sub.methods + sub.decoded
    columns = ("space", "numbers", *methods, "mean", "mean above chance", "transfer",
               "transfer above chance")  # fmt: skip
    body = []
    for title, dimension, one in every:
        if not one.plain:
            continue
        own = [one.mean(lambda s, d, m=m: s == d == m) for m in methods]
        body.append(
            (
                Cell(title),
                Cell(str(dimension), dimension),
                *map(_share, own),
                _share(one.mean(_same)),
                _share(one.mean(_same, above=True)),
                _share(one.mean(_other)),
                _share(one.mean(_other, above=True)),
            )
        )
    return html.table(columns, body) if body else ""


def _tasks(
    state: State, one: Scored, pairs: Sequence[tuple[str, str]], sub: SubspaceInfo
) -> Iterable[str]:
    """A table of each measure, with a column for each pair of source and decoder."""
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
               "kept, seen", "kept, unseen")  # fmt: skip
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
    """The metric above chance of a decoded code over that of the delta that it is the code of."""
    for row in rows:
        own = state.joint.references(space.model["name"], row["task"])[row["method"]]
        task = state.plan.task(row["task"])
        share = corrected(row["value"], own[0], task.chance, task.floor) if own else None
        if share is not None:
            yield share


def sets(state: State, space: Run) -> list[dict[str, Any]]:
    """How well a space serves the tasks that it is made of and others, for each of its methods.

    Rows: `space`, `method`, `set`, `own` and `full` (the test metric over that of the method's own
    delta and of full fine-tuning on the task, mean over tasks), `deviation` of the codes and
    `own_deviation` of the own deltas over seeds, and of refined deltas `refined` and
    `refined_deviation`; NaN where nothing was asked or finished.
    """
    found: dict[tuple[str, str], dict[str, dict[str, list[float]]]] = {}

    def note(method: str, which: str, kind: str, task: str, value: float) -> None:
        found.setdefault((method, which), {}).setdefault(kind, {}).setdefault(task, []).append(
            value
        )

    for row in _measures(state, space):
        note(row["method"], f"{row['which']}, decoded", "value", row["task"], row["value"])
    sub, plan = state.plan.subspace, state.plan
    for run in state.joint.codes(space):
        name = run.task["name"]
        seen = sub is not None and name not in sub.unseen
        other = ", other examples" if run.task.get("shots") and run.seed != plan.seeds[0] else ""
        which = f"seen{other}, trained" if seen else "unseen, trained"
        for row in _measures(state, run):
            if row.get("decoder") == run.method:
                note(run.method, which, "value", name, row["value"])
            if "refined" in row:
                note(run.method, which, "refined", name, row["refined"])
    return [_set(state, space, *key, kinds) for key, kinds in found.items()]


def _set(
    state: State, space: Run, method: str, which: str, kinds: dict[str, dict[str, list[float]]]
) -> dict[str, Any]:
    model, whole = space.model["name"], {}
    values, refined = kinds["value"], kinds.get("refined", {})
    own = {task: state.joint.references(model, task)[method] for task in values}
    if full := state.plan.of_kind("full"):
        for task in values:
            records = state.results(Place(model, task, full.name))
            whole[task] = [record.result.test for record in records if record.result]
    return {
        "space": space, "method": method, "set": which,
        "own": _over(values, own), "full": _over(values, whole),
        "deviation": _spread(values), "own_deviation": _spread(own),
        "refined": _over(refined, own), "refined_deviation": _spread(refined),
    }  # fmt: skip


def _over(values: Mapping[str, Sequence[float]], references: Mapping[str, Sequence[Any]]) -> float:
    """Mean over tasks of mean over mean."""
    parts = []
    for task, some in values.items():
        reference = numbers.mean([v for v in references.get(task, ()) if v is not None])
        if reference and not math.isnan(reference):
            parts.append(numbers.mean(some) / reference)
    return numbers.mean(parts)


def _spread(values: Mapping[str, Sequence[float]]) -> float:
    """Mean over tasks of the standard deviation over seeds."""
    return numbers.mean([statistics.stdev(some) for some in values.values() if len(some) > 1])


def _five(rows: Sequence[dict[str, Any]]) -> str:
    columns = ("space", "numbers", "method", "tasks", "of the own delta", "of full fine-tuning",
               "deviation", "of the own delta's", "refined", "its deviation")  # fmt: skip
    body = []
    for row in rows:
        run = row["space"]
        length = run.settings["dimension"]
        kinds = (("own", _share), ("full", _share), ("deviation", _plain))
        kinds += (("own_deviation", _plain), ("refined", _share), ("refined_deviation", _plain))
        body.append(
            (
                Cell(_title(run)), Cell(str(length), length), Cell(row["method"]),
                Cell(row["set"]), *(make(row[name]) for name, make in kinds),
            )
        )  # fmt: skip
    return html.table(columns, body)


def _by_dimension(
    state: State, spaces: Sequence[Run], found: dict[str, Scored], starts: Mapping[str, Scored]
) -> list[Figure]:
    """Of each model the curves of its kinds of spaces."""
    sub = state.plan.subspace
    if sub is None or all(len(dimensions) < 2 for dimensions in sub.spaces.values()):
        return []
    made = []
    for model in dict.fromkeys(run.model["name"] for run in spaces):
        own, of = [run for run in spaces if run.model["name"] == model], _of(state, model)
        for title, which in (("Codes against", _same), ("Transfer against", _other)):
            curves = _curves(own, found, list(sub.spaces), which)
            if curves:
                begun = starts[model].mean(_same, above=True) if model in starts else math.nan
                made.append(_against(f"{title} dimension{of}", curves, begun))
    return made


def _curves(
    spaces: Sequence[Run], found: dict[str, Scored], kinds: list[str], of: Choice
) -> list[Series]:
    slot, made = slots(kinds), []
    for how in kinds:
        points = tuple(
            (float(run.settings["dimension"]), found[run.digest()].mean(of, above=True))
            for run in sorted(spaces, key=lambda run: run.settings["dimension"])
            if run.settings["how"] == how
        )
        points = tuple(point for point in points if not math.isnan(point[1]))
        if points:
            made.append(Series(how, slot[how], how in DRAWN, points))
    return made


def _against(title: str, curves: list[Series], begun: float) -> Figure:
    """Curves, and the level before training."""
    drawn = list(curves)
    if not math.isnan(begun):
        ends = {f(x for s in curves for x, _ in s.points) for f in (min, max)}
        level = tuple((x, begun) for x in sorted(ends))
        slot = 1 + max(s.slot for s in curves)
        drawn.append(Series("before training", slot, True, level))
    data = tuple((s.name, x, round(y, 4)) for s in drawn for x, y in s.points)
    picture = lines(title, drawn, "numbers of a code (log)", "relative, above chance", log=True)
    caption = "Mean over tasks, methods and seeds. Dashed: random spaces, and no training."
    return Figure(title, caption, picture, ("space", "numbers", "relative"), data)


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


def _plain(value: float) -> Cell:
    return Cell("–", -math.inf, "num") if math.isnan(value) else Cell(f"{value:.3f}", value)


def _title(run: Run) -> str:
    return f"{run.settings['how']}, {run.model['name']}"


def _name(state: State, run: Run) -> str:
    of = _of(state, run.model["name"])
    return f"{run.settings['how']} space of {run.settings['dimension']}{of}"


def _of(state: State, model: str) -> str:
    """What a title says of the model, where there are several."""
    return f", {model}" if len(state.plan.models) > 1 else ""
