"""The numbers of a study: one table per model and task, one row per method."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from deltune.study.numbers import mean, spread
from deltune.study.plan import Cell, MethodInfo, TaskInfo
from deltune.study.records import Record, Result
from deltune.study.state import State


@dataclass(frozen=True, slots=True)
class Row:
    """A method on a task: means over its finished seeds."""

    cell: Cell
    method: MethodInfo
    learning_rate: float | None
    records: tuple[Record, ...]

    def over(self, read: Callable[[Result], float | None]) -> list[float]:
        """One number of every finished run."""
        values = (read(record.result) for record in self.records if record.result)
        return [value for value in values if value is not None]

    @property
    def name(self) -> str:
        """What the method is called."""
        return self.method.name

    @property
    def test(self) -> float:
        """Mean test metric."""
        return mean(self.over(lambda result: result.test))

    @property
    def test_spread(self) -> float | None:
        """Sample standard deviation of the test metric over seeds."""
        return spread(self.over(lambda result: result.test))

    @property
    def dev(self) -> float:
        """Mean best dev metric."""
        return mean(self.over(lambda result: result.dev))

    @property
    def gap(self) -> float | None:
        """Mean of |train metric - test metric| over the seeds, where the study has measured it."""
        results = [record.result for record in self.records if record.result]
        pairs = [(r.train, r.test) for r in results if r.train is not None and r.test is not None]
        return mean([abs(train - test) for train, test in pairs]) if pairs else None

    @property
    def trainable(self) -> int:
        """Trainable parameters, the head included."""
        return round(mean(self.over(lambda result: result.trainable)))

    @property
    def share(self) -> float:
        """Trainable parameters over those of the model."""
        return self.trainable / mean(self.over(lambda result: result.total))

    @property
    def saved(self) -> float:
        """Bytes of the saved delta."""
        return mean(self.over(lambda result: result.saved_bytes))

    @property
    def seconds(self) -> float:
        """Mean time in training steps."""
        return mean(self.over(lambda result: result.train_seconds))

    @property
    def step_seconds(self) -> float:
        """Mean time of one step."""
        return mean(self.over(lambda result: result.train_seconds / max(1, result.steps)))

    @property
    def peak(self) -> float | None:
        """Mean peak memory in training."""
        values = self.over(lambda result: result.peak_memory_bytes)
        return mean(values) if values else None

    @property
    def resting(self) -> float | None:
        """Mean memory just before training: interpreter, libraries, model and delta."""
        values = self.over(lambda result: result.start_memory_bytes)
        return mean(values) if values else None


@dataclass(frozen=True, slots=True)
class Table:
    """All methods on one model and task, in the order of the study."""

    model: str
    task: TaskInfo
    rows: tuple[Row, ...]
    missing: tuple[Cell, ...]
    """Cells without a finished final run."""

    def of_kind(self, kind: str) -> Row | None:
        """The first row whose method is of this kind."""
        return next((row for row in self.rows if row.method.kind == kind), None)

    @property
    def reference(self) -> Row | None:
        """Full fine-tuning."""
        return self.of_kind("full")

    @property
    def floor(self) -> Row | None:
        """Training the head alone."""
        return self.of_kind("head")

    @property
    def deltas(self) -> list[Row]:
        """The rows that are not baselines."""
        return [row for row in self.rows if row.method.family != "baseline"]

    def relative(self, row: Row) -> float | None:
        """A row's mean test metric over that of full fine-tuning."""
        reference = self.reference
        return row.test / reference.test if reference and reference.test else None


def tables(state: State) -> list[Table]:
    """The tables of a study, over what has finished so far."""
    plan = state.plan
    result = []
    for model in plan.models:
        for task in plan.tasks:
            cells = [Cell(model.name, task.name, method.name) for method in plan.methods]
            rows = [_row(state, cell) for cell in cells]
            full = tuple(row for row in rows if row.records)
            missing = tuple(row.cell for row in rows if not row.records)
            result.append(Table(model.name, task, full, missing))
    return result


def to_json(all_tables: list[Table]) -> list[dict[str, Any]]:
    """The tables as plain data, for scripts."""
    return [
        {
            "model": table.model,
            "task": asdict(table.task),
            "rows": [_row_json(table, row) for row in table.rows],
            "missing": [cell.method for cell in table.missing],
        }
        for table in all_tables
    ]


def _row(state: State, cell: Cell) -> Row:
    method = state.plan.method(cell.method)
    return Row(cell, method, state.chosen(cell), tuple(state.results(cell)))


def _row_json(table: Table, row: Row) -> dict[str, Any]:
    return {
        "method": row.name,
        "spec": row.method.text,
        "learning_rate": row.learning_rate,
        "seeds": [record.run["seed"] for record in row.records],
        "metric": table.task.metric,
        "test": row.test,
        "test_spread": row.test_spread,
        "relative": table.relative(row),
        "dev": row.dev,
        "trainable": row.trainable,
        "share": row.share,
        "saved_bytes": row.saved,
        "train_seconds": row.seconds,
        "peak_memory_bytes": row.peak,
    }
