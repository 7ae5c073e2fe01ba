"""How far a study is: which runs have ended, which learning rates are chosen, what is left."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltune.study.plan import Cell, Plan, Run
from deltune.study.records import Record, read_record, set_aside


@dataclass(frozen=True, slots=True)
class Status:
    """Counts of a study's runs, and the seconds left on so many workers (None: not yet known)."""

    name: str
    total: int
    finished: int
    failed: int
    running: int
    left: int
    blocked: int
    seconds_left: float | None

    @property
    def done(self) -> bool:
        """Whether nothing is left that could run."""
        return self.left == 0 and self.running == 0


class State:
    """The records of a plan's runs, in memory."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self.plan = plan
        self.folder = folder
        self.records: dict[str, Record] = {}
        self.cells = list(plan.cells())
        self.selections = {cell: plan.selection_runs(cell) for cell in self.cells}
        self._finals: dict[tuple[Cell, float], list[Run]] = {}
        self.running: dict[str, float] = {}
        """Digests of running runs, and the share of each that is done."""
        for cell in self.cells:
            self._read(self.selections[cell])
        for cell in self.cells:
            self._read(self.finals(cell))

    def add(self, record: Record) -> None:
        """Takes in the record of a run that just ended."""
        self.running.pop(record.digest, None)
        self.records[record.digest] = record

    def retry_failed(self) -> int:
        """Sets every failed record of the plan aside; how many there were."""
        failed = [record for record in self.records.values() if record.status == "failed"]
        for record in failed:
            set_aside(self.folder, record)
            del self.records[record.digest]
        return len(failed)

    def grid(self, cell: Cell) -> list[tuple[Run, Record | None]]:
        """The selection runs of a cell with their records."""
        return [(run, self.records.get(run.digest())) for run in self.selections[cell]]

    def chosen(self, cell: Cell) -> float | None:
        """The learning rate with the best dev metric; None while unknown or if none worked.

        Of equal ones the smaller is taken: it is nearer to the backbone.
        """
        method = self.plan.method(cell.method)
        if len(method.learning_rate) == 1:
            return method.learning_rate[0]
        grid = self.grid(cell)
        if any(record is None for _, record in grid):
            return None
        scores = [
            (record.result.dev, -run.learning_rate)
            for run, record in grid
            if record is not None and record.result is not None
        ]
        return -max(scores)[1] if scores else None

    def blocked(self, cell: Cell) -> bool:
        """Whether every learning rate of the grid failed, so that no final run can start."""
        return self.chosen(cell) is None and all(record for _, record in self.grid(cell))

    def finals(self, cell: Cell) -> list[Run]:
        """The final runs of a cell, once its learning rate is known."""
        rate = self.chosen(cell)
        return [] if rate is None else self._at(cell, rate)

    def results(self, cell: Cell) -> list[Record]:
        """The finished final records of a cell, by seed."""
        records = (self.records.get(run.digest()) for run in self.finals(cell))
        return [record for record in records if record and record.result]

    def failures(self) -> list[Record]:
        """The failed records of the plan."""
        return [record for record in self.records.values() if record.status == "failed"]

    def next_run(self) -> Run | None:
        """The next run that can start: selections first, then final runs seed by seed."""
        return next(self._waiting(), None)

    def status(self, workers: int = 1) -> Status:
        """Where the study stands."""
        blocked = sum(len(self.plan.seeds) for cell in self.cells if self.blocked(cell))
        failed = len(self.failures())
        total = sum(len(self.selections[cell]) + len(self.plan.seeds) for cell in self.cells)
        return Status(
            name=self.plan.name,
            total=total,
            finished=len(self.records) - failed,
            failed=failed,
            running=len(self.running),
            left=total - len(self.records) - len(self.running) - blocked,
            blocked=blocked,
            seconds_left=self._seconds_left(workers),
        )

    def _waiting(self) -> Iterator[Run]:
        lists = list(self.selections.values())
        finals = [self.finals(cell) for cell in self.cells]
        for index in range(len(self.plan.seeds)):
            lists.append([runs[index] for runs in finals if runs])
        for run in (run for runs in lists for run in runs):
            digest = run.digest()
            if digest not in self.records and digest not in self.running:
                yield run

    def _at(self, cell: Cell, rate: float) -> list[Run]:
        """The final runs of a cell at a learning rate, made once: status is asked for often."""
        if (cell, rate) not in self._finals:
            self._finals[cell, rate] = self.plan.final_runs(cell, rate)
        return self._finals[cell, rate]

    def _read(self, runs: list[Run]) -> None:
        for run in runs:
            record = read_record(self.folder, run)
            if record:
                self.records[record.digest] = record

    def _seconds_left(self, workers: int) -> float | None:
        ended = [record for record in self.records.values() if record.result]
        if not ended:
            return None
        rates: dict[str, list[float]] = {}
        for record in ended:
            rate = record.seconds / _weight(record.run["task"], record.run["settings"])
            rates.setdefault(record.run["method"], []).append(rate)
        every = [rate for some in rates.values() for rate in some]
        means = {method: sum(some) / len(some) for method, some in rates.items()}
        left = 0.0
        for run in self._unended():
            rate = means.get(run.method, sum(every) / len(every))
            share = 1 - self.running.get(run.digest(), 0.0)
            left += share * _weight(run.task, run.settings) * rate
        return left / max(1, workers)

    def _unended(self) -> Iterator[Run]:
        for cell in self.cells:
            if self.blocked(cell):
                continue
            rate = self.chosen(cell) or self.plan.method(cell.method).learning_rate[0]
            for run in (*self.selections[cell], *self._at(cell, rate)):
                if run.digest() not in self.records:
                    yield run


def _weight(task: dict[str, Any], settings: dict[str, Any]) -> float:
    """Work of a run up to a factor: examples seen in training, and a third of that for reading."""
    steps, epochs = settings["max_steps"], settings["num_train_epochs"]
    batch = settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"]
    examples = steps * batch if steps else task["train"] * epochs
    return max(1.0, examples + (task["dev"] * epochs + task["test"]) / 3)
