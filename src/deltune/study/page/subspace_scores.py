"""What the records of subspaces come to: relative performance of codes, by direction and seed."""

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from deltune.study import numbers
from deltune.study.plan import Cell as Place
from deltune.study.plan import Run
from deltune.study.state import State
from deltune.study.statistics import corrected

Key = tuple[str, str, str]
"""Task, source, decoder."""
Choice = Callable[[str, str], bool]
"""Whether a pair (source, decoder) is asked for."""


@dataclass(frozen=True)
class Scored:
    """What codes of one space gave on the unseen tasks: (task, source, decoder) -> relative
    performance, plain and above chance, mean over seeds; the latter None where a delta of its own
    is not told from chance (`TaskInfo.floor`)."""

    plain: Mapping[Key, float]
    above: Mapping[Key, float | None]
    seeds: Mapping[Key, Mapping[int, float]] = field(default_factory=dict)
    """Each seed's share of what is above chance."""

    def mean(self, of: Choice, above: bool = False) -> float:
        """Over all tasks, and the pairs (source, decoder) that are asked for."""
        table = self.above if above else self.plain
        values = [v for (_, s, d), v in table.items() if v is not None and of(s, d)]
        return numbers.mean(values)

    def deviation(self, of: Choice) -> float | None:
        """Standard deviation over seeds of a seed's mean above chance, over the seeds that have all
        tasks and pairs that are asked for; None where these are fewer than two."""
        rows = [one for (_, s, d), one in self.seeds.items() if of(s, d)]
        whole = set(rows[0]).intersection(*rows[1:]) if rows else set()
        return numbers.spread([numbers.mean([row[s] for row in rows]) for s in sorted(whole)])


def scored(state: State, space: Run) -> Scored:
    """The relative performance of every finished code of a space: its test metric over the mean
    of the decoding method's own deltas on the task."""
    return _relative(
        state,
        space.model["name"],
        (
            ((run.task["name"], run.method, row["decoder"]), run.seed, row["value"])
            for run in state.joint.codes(space)
            for row in measures(state, run)
            if "decoder" in row
        ),
    )


def untrained(state: State, start: Run) -> Scored:
    """The same of the deltas as they are before any training: of the code zero of all spaces."""
    rows = measures(state, start)
    found = (
        ((row["task"], row["method"], row["method"]), start.seed, row["value"]) for row in rows
    )
    return _relative(state, start.model["name"], found)


def _relative(state: State, model: str, values: Iterable[tuple[Key, int, float]]) -> Scored:
    """Of metrics by (task, source, decoder) and seed, those on unseen tasks over the decoder's
    own."""
    plain: dict[Key, list[float]] = {}
    above: dict[Key, dict[int, float]] = {}
    unseen = state.plan.subspace.unseen if state.plan.subspace else ()
    for key, seed, value in values:
        name, _, decoder = key
        own = state.joint.references(model, name)[decoder] if name in unseen else ()
        if own:
            reference, task = numbers.mean(own), state.plan.task(name)
            plain.setdefault(key, []).append(value / reference if reference else math.nan)
            share = corrected(value, reference, task.chance, task.floor)
            if share is not None:
                above.setdefault(key, {})[seed] = share
    means = {key: numbers.mean(list(above[key].values())) if key in above else None
             for key in plain}  # fmt: skip
    return Scored({key: numbers.mean(values) for key, values in plain.items()}, means, above)


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

    for row in measures(state, space):
        note(row["method"], f"{row['which']}, decoded", "value", row["task"], row["value"])
    sub, plan = state.plan.subspace, state.plan
    for run in state.joint.codes(space):
        name = run.task["name"]
        seen = sub is not None and name not in sub.unseen
        other = ", other examples" if run.task.get("shots") and run.seed != plan.seeds[0] else ""
        which = f"seen{other}, trained" if seen else "unseen, trained"
        for row in measures(state, run):
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


def measures(state: State, run: Run) -> list[dict[str, Any]]:
    """The rows that a run has measured; none while it has not."""
    record = state.records.get(run.digest())
    return (record.measures if record else None) or []


def same(source: str, decoder: str) -> bool:
    """Whether a code is decoded as what it was trained with."""
    return source == decoder


def other(source: str, decoder: str) -> bool:
    """Whether it is transferred."""
    return source != decoder
