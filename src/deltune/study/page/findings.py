"""What the numbers of a study say, in plain sentences computed from them."""

from dataclasses import dataclass

from deltune.study.numbers import metric, percent, rate, size
from deltune.study.overview import Overview
from deltune.study.summary import Row, Table

WIDE = 0.05
"""Seeds whose test metrics spread more than this are said not to agree."""
RISE = 0.005
"""A dev metric that gained more than this at its last evaluation is called still rising."""


@dataclass(frozen=True, slots=True)
class Shortfall:
    """A method that does not beat training the head alone, and what the numbers say why."""

    method: str
    text: str


def sentences(table: Table) -> list[str]:
    """The result of a table for someone who reads nothing else."""
    say = (_reference, _best, _frugal, _cost, _floor, _unsettled)
    return [text for text in (one(table) for one in say) if text]


def overall(view: Overview) -> list[str]:
    """The result over many tasks for someone who reads nothing else."""
    say = (_overall_reference, _overall_best, _overall_told_apart, _overall_floor, _overall_speed)
    return [text for text in (one(view) for one in say) if text]


def shortfalls(table: Table) -> list[Shortfall]:
    """Every method at or below head-only, named with what the numbers say why."""
    floor = table.floor
    if floor is None:
        return []
    return [
        Shortfall(row.name, _why(row, floor, table))
        for row in table.rows
        if row is not floor and row.test <= floor.test
    ]


def edge_of_grid(row: Row) -> str | None:
    """`largest` or `smallest` if the chosen learning rate ends its grid; None without a grid."""
    grid = row.method.learning_rate
    if len(grid) < 2 or row.learning_rate is None:
        return None
    if row.learning_rate == max(grid):
        return "largest"
    return "smallest" if row.learning_rate == min(grid) else None


def still_rising(row: Row) -> tuple[float, float] | None:
    """Mean dev metric of the last two evaluations, if the last is the best and clearly higher."""
    curves = [record.result.curve for record in row.records if record.result]
    curves = [curve for curve in curves if len(curve) > 1]
    if not curves:
        return None
    before = sum(curve[-2][2] for curve in curves) / len(curves)
    last = sum(curve[-1][2] for curve in curves) / len(curves)
    best = sum(max(point[2] for point in curve) for curve in curves) / len(curves)
    return (before, last) if last - before > RISE and last >= best - 1e-9 else None


def best_delta(table: Table) -> Row | None:
    """The delta method with the best mean test metric."""
    return max(table.deltas, key=lambda row: row.test, default=None)


def _reference(table: Table) -> str:
    full = table.reference
    if full is None:
        return ""
    return (
        f"Full fine-tuning reaches a test {table.task.metric} of "
        f"{metric(full.test, full.test_spread)}, training every one of the model's parameters "
        f"and saving {size(full.saved)} per task."
    )


def _best(table: Table) -> str:
    best = best_delta(table)
    if best is None:
        return ""
    text = (
        f"The best delta is {best.name} with {metric(best.test, best.test_spread)}"
        + _of_full(table, best)
        + f", training {percent(best.share)} of the parameters and saving {size(best.saved)}"
    )
    rivals = [row.name for row in table.deltas if row is not best and _level(row, best)]
    if rivals:
        text += f"; {_join(rivals)} cannot be told apart from it with so few seeds"
    return text + "."


def _frugal(table: Table) -> str:
    full = table.reference
    if full is None:
        return ""
    enough = [row for row in table.deltas if row.test >= 0.97 * full.test]
    least = min(enough, key=lambda row: row.trainable, default=None)
    if least is None:
        return "No delta keeps 97 % of full fine-tuning here."
    return (
        f"The smallest delta that keeps 97 % of full fine-tuning is {least.name}: "
        f"{least.trainable:,} trained parameters, {size(least.saved)} on disk, "
        f"{full.saved / least.saved:,.0f} times less than a copy of the model."
    )


def _cost(table: Table) -> str:
    full, rows = table.reference, table.deltas
    if full is None or not rows:
        return ""
    by_step = sorted(rows, key=lambda row: row.step_seconds)
    quick, slow = by_step[0], by_step[-1]
    text = (
        f"A training step takes {percent(quick.step_seconds / full.step_seconds)} "
        f"({quick.name}) to {percent(slow.step_seconds / full.step_seconds)} ({slow.name}) "
        "of the time that it takes in full fine-tuning"
    )
    lean = min((row for row in rows if row.peak), key=lambda row: row.peak or 0, default=None)
    if lean and lean.peak and full.peak:
        text += f"; peak memory goes from {size(full.peak)} down to {size(lean.peak)} ({lean.name})"
    return text + "."


def _floor(table: Table) -> str:
    floor = table.floor
    if floor is None:
        return ""
    over = [row for row in table.rows if row is not floor and row.test > floor.test]
    others = len(table.rows) - 1
    text = f"Training the head alone gives {metric(floor.test, floor.test_spread)}"
    if len(over) == others:
        return text + f"; all {others} other methods beat it."
    return text + f"; {len(over)} of the {others} other methods beat it (see the warning)."


def _unsettled(table: Table) -> str:
    names = [row.name for row in table.rows if (row.test_spread or 0.0) > WIDE]
    if not names:
        return ""
    differ = "differs" if len(names) == 1 else "differ"
    return (
        f"{_join(names)} {differ} widely from seed to seed (a spread above {WIDE:g}): such a mean "
        "says little; a lower learning rate or a longer run would settle it."
    )


def _why(row: Row, floor: Row, table: Table) -> str:
    reasons = [
        reason
        for reason in (
            _within_spread(row, floor),
            _disagree(row),
            _budget(row),
            _edge(row),
            _unlearned(row),
            _overfit(row),
        )
        if reason
    ]
    head = (
        f"test {table.task.metric} {metric(row.test, row.test_spread)} against "
        f"{metric(floor.test, floor.test_spread)} of {floor.name}"
    )
    unsaid = "the numbers of these runs do not say why: its curve is flat and inside its grid"
    return f"{head}. " + _sentence("; ".join(reasons) or unsaid)


def _within_spread(row: Row, floor: Row) -> str:
    if not _level(row, floor):
        return ""
    return "the difference is within the spread over seeds, so the two are level"


def _disagree(row: Row) -> str:
    if (row.test_spread or 0.0) <= WIDE:
        return ""
    tests = row.over(lambda result: result.test)
    return (
        f"its seeds disagree ({metric(min(tests))} to {metric(max(tests))}), so some of its runs "
        "did not train: lower the learning rate or train longer"
    )


def _budget(row: Row) -> str:
    rise = still_rising(row)
    if rise is None:
        return ""
    return (
        f"its dev metric was still rising at the last evaluation ({metric(rise[0])} to "
        f"{metric(rise[1])}), so the budget is too short for it: give it more epochs"
    )


def _edge(row: Row) -> str:
    edge = edge_of_grid(row)
    if edge is None or row.learning_rate is None:
        return ""
    return f"its learning rate {rate(row.learning_rate)} is the {edge} of its grid: extend the grid"


def _unlearned(row: Row) -> str:
    for losses in (record.result.losses for record in row.records if record.result):
        tenth = max(1, len(losses) // 10)
        first, last = sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth
        if last > 0.97 * first:
            return f"its training loss hardly fell ({first:.3f} to {last:.3f})"
    return ""


def _overfit(row: Row) -> str:
    falls = []
    for curve in (record.result.curve for record in row.records if record.result):
        best = max(curve, key=lambda point: point[2])
        falls.append(best[2] - curve[-1][2])
    if not falls or min(falls) <= RISE:
        return ""
    return f"its dev metric fell by {sum(falls) / len(falls):.3f} after its best step (overfitting)"


def _level(row: Row, other: Row) -> bool:
    """Whether two means differ by less than the larger of their spreads."""
    spreads = [value for value in (row.test_spread, other.test_spread) if value is not None]
    return bool(spreads) and abs(row.test - other.test) <= max(spreads)


def _of_full(table: Table, row: Row) -> str:
    relative = table.relative(row)
    return "" if relative is None else f", {percent(relative)} of full fine-tuning"


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."


def _join(words: list[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def _deltas(view: Overview) -> list[str]:
    return [method.name for method in view.methods if method.family != "baseline"]


def _overall_reference(view: Overview) -> str:
    if view.reference is None:
        return ""
    mean = metric(view.average(view.reference))
    return (
        f"Over {len(view.tables)} tasks full fine-tuning reaches a mean test metric of {mean}; it "
        f"is above chance by two standard errors on {view.above_chance} of them."
    )


def _overall_best(view: Overview) -> str:
    best = min(_deltas(view), key=view.ranks.__getitem__, default=None)
    if best is None:
        return ""
    text = f"The best delta by average rank is {best}: rank {view.ranks[best]:.2f} of "
    text += f"{len(view.methods)}, mean {metric(view.average(best))}"
    relative, found = view.corrected(best), view.comparisons.get(best)
    if relative is not None:
        text += f", {percent(relative)} of full fine-tuning above chance"
    if found is not None:
        text += (
            f"; it wins against full fine-tuning on {percent(found.wins)} of the tasks (mean "
            f"difference {found.difference:+.3f}, p = {view.adjusted[best]:.2g})"
        )
    return text + "."


def _overall_told_apart(view: Overview) -> str:
    if len(view.methods) < 3 or len(view.tables) < 2:
        return ""
    order = sorted(view.ranks, key=view.ranks.__getitem__)
    text = "By average rank: " + ", ".join(f"{name} {view.ranks[name]:.2f}" for name in order)
    return text + (
        f"; ranks closer than {view.critical_difference:.2f} cannot be told apart (Nemenyi, 5 %)."
    )


def _overall_floor(view: Overview) -> str:
    floor = next((method.name for method in view.methods if method.kind == "head"), None)
    if floor is None:
        return ""
    below = {
        name: sum(
            row.test <= least.test
            for row, least in zip(view.rows(name), view.rows(floor), strict=True)
        )
        for name in _deltas(view)
    }
    said = ", ".join(f"{name} on {count}" for name, count in below.items())
    return (
        f"Training the head alone gives a mean of {metric(view.average(floor))}; not above it, of "
        f"{len(view.tables)} tasks: {said}."
    )


def _overall_speed(view: Overview) -> str:
    names = [method.name for method in view.methods]
    shares = {name: view.steps(name)[0] for name in names}
    order = sorted(names, key=shares.__getitem__)
    return (
        "90 % of its own best dev metric is reached after "
        + ", ".join(
            f"{percent(shares[name])} of the steps by {name}" for name in (order[0], order[-1])
        )
        + "."
    )
