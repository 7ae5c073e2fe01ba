"""The section of a report on subspaces: codes, transfer, reconstruction."""

import math
from collections.abc import Mapping, Sequence

from deltune.study.joint import DRAWN
from deltune.study.page import html
from deltune.study.page.figures import Figure, blank, gallery, lines, slots
from deltune.study.page.landscape import LAND, landscape
from deltune.study.page.likeness import ALIKE, likeness
from deltune.study.page.subspace_scores import (
    Choice,
    Scored,
    measures,
    other,
    same,
    scored,
    sets,
    untrained,
)
from deltune.study.page.subspace_tables import (
    directions,
    every_task,
    name_of,
    of_model,
    of_sets,
    reconstruction,
    summary,
    trained_rows,
    untrained_rows,
)
from deltune.study.page.svg import Series
from deltune.study.plan import Run
from deltune.study.settings import Ablations
from deltune.study.state import State


def subspace(state: State) -> str:
    """What the spaces hold, what is reached in them, and what passes from method to method."""
    sub = state.plan.subspace
    spaces = [run for run in state.joint.spaces() if measures(state, run)]
    if sub is None or not spaces:
        return ""
    found = {run.digest(): scored(state, run) for run in spaces}
    starts = {run.model["name"]: untrained(state, run) for run in state.joint.starts()}
    parts = [
        html.paragraph(_NOTE + (_ABLATIONS if sub.ablations != Ablations() else ""), "note"),
        "<h3>Codes and transfer</h3>",
        summary([*untrained_rows(starts), *trained_rows(state, spaces, found)], sub),
        gallery(_by_dimension(state, spaces, found, starts)),
        *_below("Transfer by direction", _ACROSS, directions(state, spaces, found, sub)),
        *_below("Reconstruction", _HELD, reconstruction(state, spaces)),
    ]
    if sub.tune_seen or sub.refine:
        rows = [row for run in spaces for row in sets(state, run)]
        parts += _below("Seen and unseen tasks", _SETS, of_sets(state, rows))
    for model, one in starts.items():
        if one.plain:
            name = f"before training, {model}: every task"
            pairs = [(method, method) for method in sub.methods + sub.decoded]
            parts.append(html.details(name, *every_task(state, one, pairs, sub)))
    for run in spaces:
        if found[run.digest()].plain:
            methods = sub.decoders(run.settings["how"])
            pairs = [(m, m) for m in methods]
            pairs += [(s, d) for s in methods for d in methods if s != d]
            name = f"{name_of(state, run)}: every task"
            parts.append(html.details(name, *every_task(state, found[run.digest()], pairs, sub)))
    parts += _below("Likeness of codes", ALIKE, likeness(state, spaces))
    drawn = [
        figure
        for run in spaces
        for land in state.joint.landscapes(run)
        for figure in landscape(state.plan, land, measures(state, land), name_of(state, run))
    ]
    parts += _below("Landscapes", LAND, gallery(drawn) if drawn else "")
    return html.section("Subspaces", *parts)


def _below(title: str, note: str, body: str) -> list[str]:
    """What there is under a heading; nothing where there is nothing."""
    return [f"<h3>{title}</h3>", html.paragraph(note, "note"), body] if body else []


_NOTE = """The deltas of all other tasks span a space of few numbers that all methods share; on
each unseen task the code alone was trained with one method (its rate, if there are several,
chosen on dev) and then decoded by every method without training. Relative: the test metric over
that of the decoding method's own deltas of the task, mean over tasks and seeds; above chance,
both less the metric of guessing (tasks on which the own delta is not above it by two standard
errors are left out). Random spaces know nothing of the tasks: the control. Before training: the
deltas as they begin, which is the code zero of every space; what a code adds to it is what it
found."""
_ABLATIONS = """ In brackets: learned with another weight of the reconstruction, from so many of the
tasks, from those of one type, or from deltas of so few examples."""
_ACROSS = """The codes of the method of a row, decoded by the method of a column: means over tasks
and seeds. Where both are one method nothing is transferred: these are the tuned codes."""
_HELD = """How far a delta is from its decoded code, || D - U I || / || D ||, mean over
tasks, beside what no space of so many numbers can go below on all tasks together that it was made
of (so that the mean over them may be less); and kept: the test metric of the
decoded code above guessing over that of the delta itself (first seed), mean over tasks on which the
delta is above guessing by two standard errors."""
_SETS = """Decoded: the code of a delta, by the encoder, not trained. Trained: the code alone, found
anew; with other examples on the tasks of the space's other seeds in a few-shot study. Refined: the
delta itself, trained as on its own but from what the trained code means. Means over tasks; the
deviation is that of the test metric over seeds, mean over tasks."""


def _by_dimension(
    state: State, spaces: Sequence[Run], found: dict[str, Scored], starts: Mapping[str, Scored]
) -> list[Figure]:
    """Of each model the curves of its kinds of spaces."""
    sub = state.plan.subspace
    if sub is None or all(len(dimensions) < 2 for dimensions in sub.spaces.values()):
        return []
    made = []
    for model in dict.fromkeys(run.model["name"] for run in spaces):
        own, of = [run for run in spaces if run.model["name"] == model], of_model(state, model)
        for title, which in (("Codes against", same), ("Transfer against", other)):
            curves = _curves(state, own, found, which)
            if curves:
                begun = starts[model].mean(same, above=True) if model in starts else math.nan
                made.append(_against(f"{title} dimension{of}", curves, begun))
    return made


def _curves(
    state: State, spaces: Sequence[Run], found: Mapping[str, Scored], of: Choice
) -> list[Series]:
    kinds = list(state.plan.subspace.spaces) if state.plan.subspace else []
    slot, made = slots(kinds), []
    for how in kinds:
        points, bars = [], []
        for run in sorted(spaces, key=lambda run: run.settings["dimension"]):
            one, length = found[run.digest()], float(run.settings["dimension"])
            height = one.mean(of, above=True)
            if state.joint.called(run) == how and not math.isnan(height):
                points.append((length, height))
                bars.append(one.deviation(of))
        if points:
            made.append(Series(how, slot[how], how in DRAWN, tuple(points), tuple(bars)))
    return made


def _against(title: str, curves: list[Series], begun: float) -> Figure:
    """Curves, and the level before training."""
    drawn = list(curves)
    if not math.isnan(begun):
        ends = {f(x for s in curves for x, _ in s.points) for f in (min, max)}
        level = tuple((x, begun) for x in sorted(ends))
        slot = 1 + max(s.slot for s in curves)
        drawn.append(Series("before training", slot, True, level, (None,) * len(level)))
    data = tuple(
        (s.name, x, round(y, 4), blank(bar))
        for s in drawn
        for (x, y), bar in zip(s.points, s.bars, strict=True)
    )
    picture = lines(title, drawn, "numbers of a code (log)", "relative, above chance", log=True)
    caption = "Mean over tasks, methods and seeds. Dashed: random spaces, and no training."
    if any(bar is not None for s in drawn for bar in s.bars):
        caption += (
            " Bars: standard deviation over the seeds of the codes, of a seed's mean over tasks and"
            " methods."
        )
    columns = ("space", "numbers", "relative", "deviation")
    return Figure(title, caption, picture, columns, data)
