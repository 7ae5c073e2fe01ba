"""The tables of a report on subspaces."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from deltune.study import numbers
from deltune.study.page import html
from deltune.study.page.html import Cell
from deltune.study.page.subspace_scores import Choice, Scored, measures, other, same
from deltune.study.plan import Run, SubspaceInfo
from deltune.study.state import State
from deltune.study.statistics import corrected

RELATIVE, ABOVE, MEAN = "Relative", "Above chance", "Mean over tasks"


def untrained_rows(starts: Mapping[str, Scored]) -> list[tuple[str, int, Scored]]:
    """Title, numbers and scores of what was not trained."""
    return [(f"before training, {model}", 0, one) for model, one in starts.items()]


def trained_rows(
    state: State, spaces: Sequence[Run], found: Mapping[str, Scored]
) -> list[tuple[str, int, Scored]]:
    """The same of the spaces."""
    return [
        (title_of(state, run), run.settings["dimension"], found[run.digest()]) for run in spaces
    ]


def summary(every: Sequence[tuple[str, int, Scored]], sub: SubspaceInfo) -> str:
    """A row for each space: the means of what is tuned, and of what is transferred."""
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
                _share(one.mean(same)),
                _share(one.mean(same, above=True)),
                _share(one.mean(other)),
                _share(one.mean(other, above=True)),
            )
        )
    return html.table(columns, body) if body else ""


def every_task(
    state: State, one: Scored, pairs: Sequence[tuple[str, str]], sub: SubspaceInfo
) -> Iterable[str]:
    """A table of each measure, with a column for each pair of source and decoder, and its mean."""
    columns = ("task", *(s if s == d else f"{s} to {d}" for s, d in pairs))
    for title, table in ((RELATIVE, one.plain), (ABOVE, one.above)):
        body = []
        for task in sub.unseen:
            values = [table.get((task, *pair)) for pair in pairs]
            if any(value is not None for value in values):
                body.append((Cell(state.plan.task(task).title), *map(_share, values)))
        if body:
            means = [one.mean(_is(*pair), above=title == ABOVE) for pair in pairs]
            yield f"<h4>{title}</h4>"
            yield html.table(columns, [*body, (Cell(MEAN), *map(_share, means))])


def directions(
    state: State, spaces: Sequence[Run], found: Mapping[str, Scored], sub: SubspaceInfo
) -> str:
    """A table of each measure, with the codes of one method in a row, decoded in the columns."""
    methods, parts = sub.methods + sub.decoded, []
    for title in (RELATIVE, ABOVE):
        body = []
        for run in spaces:
            one, length = found[run.digest()], run.settings["dimension"]
            for source in sub.decoders(run.settings["how"]) if one.plain else ():
                means = [one.mean(_is(source, to), above=title == ABOVE) for to in methods]
                head = Cell(title_of(state, run)), Cell(str(length), length), Cell(source)
                body.append((*head, *map(_share, means)))
        columns = ("space", "numbers", "codes of", *(f"as {name}" for name in methods))
        if body:
            parts += [f"<h4>{title}</h4>", html.table(columns, body)]
    return "".join(parts)


def reconstruction(state: State, spaces: Sequence[Run]) -> str:
    """A row for each space and method: how far decoded codes are from their deltas."""
    columns = ("space", "numbers", "method", "bound", "error, seen", "error, unseen",
               "kept, seen", "kept, unseen")  # fmt: skip
    body = []
    for run in spaces:
        rows = measures(state, run)
        for method in dict.fromkeys(row["method"] for row in rows):
            own = [row for row in rows if row["method"] == method]
            errors, kept = [], []
            for which in ("seen", "unseen"):
                some = [row for row in own if row["which"] == which]
                errors.append(numbers.mean([row["error"] for row in some]))
                kept.append(numbers.mean(list(_kept(state, run, some))))
            body.append(
                (
                    Cell(title_of(state, run)),
                    Cell(str(run.settings["dimension"]), run.settings["dimension"]),
                    Cell(method),
                    *(Cell(f"{v:.3f}", v) for v in (own[0]["bound"], *errors)),
                    *map(_share, kept),
                )
            )
    return html.table(columns, body)


def _kept(state: State, space: Run, rows: Iterable[dict[str, Any]]) -> Iterable[float]:
    """The metric above chance of a decoded code over that of the delta that it is the code of."""
    finals = {(t["task"]["name"], t["method"]): t["final"] for t in space.targets or ()}
    for row in rows:
        record = state.records.get(finals[row["task"], row["method"]])
        own = record.result.test if record and record.result else None
        task = state.plan.task(row["task"])
        share = None if own is None else corrected(row["value"], own, task.chance, task.floor)
        if share is not None:
            yield share


def of_sets(state: State, rows: Sequence[dict[str, Any]]) -> str:
    """The rows of `sets`."""
    columns = ("space", "numbers", "method", "tasks", "of the own delta", "of full fine-tuning",
               "deviation", "of the own delta's", "refined", "its deviation")  # fmt: skip
    body = []
    for row in rows:
        run = row["space"]
        length = run.settings["dimension"]
        kinds = (("own", _share), ("full", _share), ("deviation", decimal))
        kinds += (("own_deviation", decimal), ("refined", _share), ("refined_deviation", decimal))
        body.append(
            (
                Cell(title_of(state, run)), Cell(str(length), length), Cell(row["method"]),
                Cell(row["set"]), *(make(row[name]) for name, make in kinds),
            )
        )  # fmt: skip
    return html.table(columns, body)


def _share(value: float | None) -> Cell:
    missing = value is None or math.isnan(value)
    return Cell("–", -math.inf, "num") if missing else Cell(f"{100 * value:.1f} %", value)


def decimal(value: float) -> Cell:
    """A number to three decimals; a dash where there is none."""
    return Cell("–", -math.inf, "num") if math.isnan(value) else Cell(f"{value:.3f}", value)


def _is(source: str, decoder: str) -> Choice:
    return lambda one, two: (one, two) == (source, decoder)


def title_of(state: State, run: Run) -> str:
    """What the rows of a space begin with."""
    return f"{state.joint.called(run)}, {run.model['name']}"


def name_of(state: State, run: Run) -> str:
    """What a space is called in titles."""
    of = of_model(state, run.model["name"])
    return f"{state.joint.called(run)} space of {run.settings['dimension']}{of}"


def of_model(state: State, model: str) -> str:
    """What a title says of the model, where there are several."""
    return f", {model}" if len(state.plan.models) > 1 else ""
