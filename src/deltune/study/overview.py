"""A model's methods over many tasks: averages, relative performance, ranks, tests, convergence."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from deltune.study import statistics
from deltune.study.numbers import mean
from deltune.study.plan import MethodInfo, TaskInfo
from deltune.study.records import Result
from deltune.study.statistics import Comparison
from deltune.study.summary import Row, Table


@dataclass(frozen=True)
class Overview:
    """The tables of one model that every method has finished, so that all averages are over the
    same tasks.

    Attributes:
        model: the model.
        tables: those tables, one for each task.
        left_out: tasks that some method has not finished.
    """

    model: str
    tables: tuple[Table, ...]
    left_out: tuple[str, ...]

    @property
    def methods(self) -> list[MethodInfo]:
        """The methods, in the order of the study."""
        return [row.method for row in self.tables[0].rows]

    @property
    def tasks(self) -> list[TaskInfo]:
        """The tasks, in the order of the study."""
        return [table.task for table in self.tables]

    @property
    def types(self) -> list[str]:
        """The types of the tasks, those with most tasks first."""
        counts: dict[str, int] = {}
        for task in self.tasks:
            counts[task.type] = counts.get(task.type, 0) + 1
        return sorted(counts, key=lambda kind: (-counts[kind], kind))

    def rows(self, method: str) -> list[Row]:
        """A method's row of each task."""
        return self._rows[method]

    def average(self, method: str, kind: str | None = None) -> float:
        """Mean test metric over the tasks, or those of a type; each task counts alike."""
        rows = zip(self.tables, self.rows(method), strict=True)
        return mean([row.test for table, row in rows if kind in (None, table.task.type)])

    def count(self, kind: str) -> int:
        """Tasks of a type."""
        return sum(task.type == kind for task in self.tasks)

    @cached_property
    def reference(self) -> str | None:
        """The name of full fine-tuning."""
        return next((method.name for method in self.methods if method.kind == "full"), None)

    def relative(self, method: str) -> float | None:
        """Mean over the tasks of the test metric over that of full fine-tuning; tasks on which that
        is not above 0 are left out."""
        pairs = self._against_full(method)
        return mean([one / full for one, full, _ in pairs if full > 0]) if pairs else None

    def corrected(self, method: str) -> float | None:
        """The same after chance is subtracted from both; tasks on which full fine-tuning is not
        told from chance (`TaskInfo.floor`) are left out."""
        found = [
            statistics.corrected(one, full, task.chance, task.floor)
            for one, full, task in self._against_full(method)
        ]
        kept = [value for value in found if value is not None]
        return mean(kept) if kept else None

    @property
    def above_chance(self) -> int:
        """Tasks on which full fine-tuning is above chance by two standard errors."""
        pairs = self._against_full(self.reference) if self.reference else []
        return sum(full > task.floor for _, full, task in pairs)

    @cached_property
    def ranks(self) -> dict[str, float]:
        """Average rank over the tasks; the best would have 1."""
        names = [method.name for method in self.methods]
        scores = [[row.test for row in table.rows] for table in self.tables]
        return dict(zip(names, statistics.average_ranks(scores), strict=True))

    @cached_property
    def friedman(self) -> tuple[float, float]:
        """Friedman's statistic and p-value."""
        return statistics.friedman([[row.test for row in table.rows] for table in self.tables])

    @property
    def critical_difference(self) -> float:
        """How far average ranks must be apart to differ at 5 %."""
        return statistics.critical_difference(len(self.methods), len(self.tables))

    @cached_property
    def comparisons(self) -> dict[str, Comparison]:
        """Each other method against full fine-tuning."""
        if self.reference is None:
            return {}
        full = self._seeds(self.reference)
        names = [method.name for method in self.methods if method.name != self.reference]
        return {name: statistics.compare(self._seeds(name), full) for name in names}

    @cached_property
    def adjusted(self) -> dict[str, float]:
        """The p-values of the comparisons, adjusted by Holm's rule."""
        values = [found.p for found in self.comparisons.values()]
        return dict(zip(self.comparisons, statistics.holm(values), strict=True))

    def steps(self, method: str) -> tuple[float, float]:
        """Mean share of the steps, and mean seconds, until 90 % of a run's own best dev metric."""
        shares, seconds = [], []
        for result in self._results(method):
            step, second = statistics.steps_to(result.curve)
            shares.append(step / result.steps)
            seconds.append(second)
        return mean(shares), mean(seconds)

    def area(self, method: str) -> float:
        """Mean height of the dev curves, by the trapezoid rule."""
        return mean([statistics.area(result.curve) for result in self._results(method)])

    @cached_property
    def begun(self) -> tuple[float, list[TaskInfo]]:
        """The share of the steps at which mean curves begin, and the tasks of which every run has
        been evaluated by then: the ones that show most, as tasks times what is left of the steps.
        """
        firsts = [
            max(r.result.curve[0][0] / r.result.steps for row in table.rows for r in row.records
                if r.result)
            for table in self.tables
        ]  # fmt: skip
        counts = {first: sum(other <= first for other in firsts) for first in firsts}
        start = max(counts, key=lambda first: ((1 - first) * counts[first], first))
        pairs = zip(firsts, self.tasks, strict=True)
        return start, [task for first, task in pairs if first <= start]

    def curve(self, method: str, reads: int) -> list[tuple[float, float]]:
        """The mean dev metric over the tasks that have begun (`begun`), at shares of the steps,
        each curve as a line between evaluations; `reads` values from there to the end."""
        first, tasks = self.begun
        curves = [
            (record.result.curve, record.result.steps)
            for row, task in zip(self.rows(method), self.tasks, strict=True) if task in tasks
            for record in row.records if record.result
        ]  # fmt: skip
        places = [first + (1 - first) * k / max(1, reads - 1) for k in range(reads)]
        return [
            (place, mean([_height(curve, place * steps) for curve, steps in curves]))
            for place in places
        ]

    def gap(self, method: str) -> float | None:
        """Mean over the tasks of |train metric - test metric|, where the study has measured it."""
        gaps = [row.gap for row in self.rows(method)]
        known = [gap for gap in gaps if gap is not None]
        return mean(known) if known else None

    @cached_property
    def _rows(self) -> dict[str, list[Row]]:
        found: dict[str, list[Row]] = {}
        for table in self.tables:
            for row in table.rows:
                found.setdefault(row.name, []).append(row)
        return found

    def _results(self, method: str) -> list[Result]:
        return [r.result for row in self.rows(method) for r in row.records if r.result]

    def _seeds(self, method: str) -> list[list[float]]:
        return [row.over(lambda result: result.test) for row in self.rows(method)]

    def _against_full(self, method: str) -> list[tuple[float, float, TaskInfo]]:
        if self.reference is None:
            return []
        rows = zip(self.rows(method), self.rows(self.reference), self.tasks, strict=True)
        return [(row.test, full.test, task) for row, full, task in rows]


def overviews(tables: Sequence[Table]) -> list[Overview]:
    """One for each model of which every method has finished at least one task."""
    found = []
    for model in dict.fromkeys(table.model for table in tables):
        own = [table for table in tables if table.model == model]
        whole = tuple(table for table in own if table.rows and not table.missing)
        rest = tuple(table.task.name for table in own if table not in whole)
        if whole:
            found.append(Overview(model, whole, rest))
    return found


def _height(curve: Sequence[Sequence[float]], step: float) -> float:
    for before, after in pairwise(curve):
        if before[0] <= step <= after[0]:
            share = (step - before[0]) / (after[0] - before[0])
            return before[2] + share * (after[2] - before[2])
    return curve[-1][2] if step >= curve[-1][0] else curve[0][2]
