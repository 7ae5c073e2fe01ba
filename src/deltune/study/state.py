"""How far a study is: which runs have ended, which learning rates are chosen, what is left."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltune.study.joint import Joint
from deltune.study.plan import ALONE, TRAINED, Cell, Plan, Run
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
        self.bare = plan.bare_runs()
        self.costs = plan.cost_runs()
        self._finals: dict[tuple[Cell, tuple[float, ...]], list[Run]] = {}
        self._chosen: dict[Cell, float] = {}
        self.joint = Joint(plan, self.records, self.finals, self.blocked)
        self.running: dict[str, float] = {}
        """Digests of running runs, and the share of each that is done."""
        for cell in self.cells:
            self._read(self.selections[cell])
        for cell in self.cells:
            self._read(self.finals(cell))
        for cell in self.cells:
            self._read(self.followers(cell))
        for _ in ("spaces", "codes", "landscapes"):
            self._read(self.joint.runs())  # each shows the next
        self._read([*self.bare, *self.costs])

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
        self._chosen.clear()
        return len(failed)

    def grid(self, cell: Cell) -> list[tuple[Run, Record | None]]:
        """The selection runs of a cell with their records."""
        return [(run, self.records.get(run.digest())) for run in self.selections[cell]]

    def chosen(self, cell: Cell) -> float | None:
        """The learning rate with the best mean dev metric over the pilots (a cell is its own pilot
        where the study has none); None while unknown or if none worked.

        Of equal ones the smaller is taken: it is nearer to the backbone.
        """
        method = self.plan.method(cell.method)
        if len(method.learning_rate) == 1:
            return method.learning_rate[0]
        if cell in self._chosen:
            return self._chosen[cell]
        grids = [self.grid(pilot) for pilot in self.plan.pilots_of(cell)]
        if not all(record for grid in grids for _, record in grid):
            return None
        scores: dict[float, list[float]] = {}
        for run, record in (pair for grid in grids for pair in grid):
            if record is not None and record.result is not None:
                scores.setdefault(run.learning_rate, []).append(record.result.dev)
        whole = [
            (sum(devs) / len(devs), -rate)
            for rate, devs in scores.items()
            if len(devs) == len(grids)
        ]
        if whole:
            self._chosen[cell] = -max(whole)[1]
        return self._chosen.get(cell)

    def rates(self, cell: Cell) -> tuple[float, ...] | None:
        """The learning rate of each stage of a cell; None while one is unknown."""
        stages = self.plan.method(cell.method).stages or (cell.method,)
        found = [self.chosen(Cell(cell.model, cell.task, stage)) for stage in stages]
        known = tuple(rate for rate in found if rate is not None)
        return known if len(known) == len(stages) else None

    def blocked(self, cell: Cell) -> bool:
        """Whether no learning rate of a grid worked, so that no final run can start."""
        stages = self.plan.method(cell.method).stages or (cell.method,)
        for stage in (Cell(cell.model, cell.task, name) for name in stages):
            pilots = self.plan.pilots_of(stage)
            every = all(record for pilot in pilots for _, record in self.grid(pilot))
            if every and self.chosen(stage) is None:
                return True
        return False

    def finals(self, cell: Cell) -> list[Run]:
        """The final runs of a cell, once its learning rates are known."""
        rates = self.rates(cell)
        return [] if rates is None else self._at(cell, rates)

    def followers(self, cell: Cell) -> list[Run]:
        """The runs that try the deltas of a cell's finished final runs elsewhere."""
        found = [self.plan.transfer_run(record.spec) for record in self.results(cell)]
        return [run for run in found if run is not None]

    def results(self, cell: Cell) -> list[Record]:
        """The finished final records of a cell, by seed."""
        records = (self.records.get(run.digest()) for run in self.finals(cell))
        return [record for record in records if record and record.result]

    def failures(self) -> list[Record]:
        """The failed records of the plan."""
        return [record for record in self.records.values() if record.status == "failed"]

    def next_run(self) -> Run | None:
        """The next run that can start: selections, final runs seed by seed, then what follows them,
        models as they are, subspaces, and last the cost runs, each alone."""
        if any(run.digest() in self.running for run in self.costs):
            return None
        run = next(self._waiting(), None)
        return None if run and run.kind in ALONE and self.running else run

    def status(self, workers: int = 1) -> Status:
        """Where the study stands."""
        blocked = sum(self._of_cell(cell) for cell in self.cells if self.blocked(cell))
        failed = len(self.failures())
        lost = sum(1 for cell in self.cells for run in self._orphans(cell)) + self.joint.lost()
        selections = sum(map(len, self.selections.values()))
        total = selections + sum(map(self._of_cell, self.cells)) + self.joint.total
        total += len(self.bare) + len(self.costs)
        return Status(
            name=self.plan.name,
            total=total,
            finished=len(self.records) - failed,
            failed=failed,
            running=len(self.running),
            left=total - len(self.records) - len(self.running) - blocked - lost,
            blocked=blocked + lost,
            seconds_left=self._seconds_left(workers),
        )

    def _of_cell(self, cell: Cell) -> int:
        """How many final runs and followers a cell has."""
        return len(self.plan.seeds_of(cell.task)) + (cell.method in self.plan.transferred)

    def _orphans(self, cell: Cell) -> list[Run]:
        """Final runs that failed and had a follower."""
        if cell.method not in self.plan.transferred:
            return []
        first = [run for run in self.finals(cell) if run.seed == self.plan.seeds[0]]
        records = [(run, self.records.get(run.digest())) for run in first]
        return [run for run, record in records if record and record.status == "failed"]

    def _waiting(self) -> Iterator[Run]:
        lists = list(self.selections.values())
        finals = [self.finals(cell) for cell in self.cells]
        for index in range(len(self.plan.seeds)):
            lists.append([runs[index] for runs in finals if len(runs) > index])
        lists += [*(self.followers(cell) for cell in self.cells), self.bare]
        for run in (run for runs in (*lists, self.joint.runs(), self.costs) for run in runs):
            digest = run.digest()
            if digest not in self.records and digest not in self.running:
                yield run

    def _at(self, cell: Cell, rates: tuple[float, ...]) -> list[Run]:
        """The final runs of a cell at its learning rates, made once: status is asked for often."""
        if (cell, rates) not in self._finals:
            self._finals[cell, rates] = self.plan.final_runs(cell, *rates)
        return self._finals[cell, rates]

    def _read(self, runs: list[Run]) -> None:
        for run in runs:
            record = read_record(self.folder, run)
            if record:
                self.records[record.digest] = record

    def _seconds_left(self, workers: int) -> float | None:
        ended = [record for record in self.records.values() if record.status == "finished"]
        if not ended:
            return None
        rates: dict[tuple[str, ...], list[float]] = {}
        for record in ended:
            for key in _alike(record.spec):
                rates.setdefault(key, []).append(record.seconds / _weight(record.spec))
        means = {key: sum(some) / len(some) for key, some in rates.items()}

        def seconds(run: Run) -> float:
            return _weight(run) * next(means[key] for key in _alike(run) if key in means)

        left = 0.0
        for run in self._unended():
            left += (1 - self.running.get(run.digest(), 0.0)) * seconds(run)
        return left / max(1, workers)

    def _unended(self) -> Iterator[Run]:
        for cell in self.cells:
            if self.blocked(cell):
                continue
            stages = self.plan.method(cell.method).stages or (cell.method,)
            first = tuple(self.plan.method(stage).learning_rate[0] for stage in stages)
            finals = self._at(cell, self.rates(cell) or first)
            for run in (*self.selections[cell], *finals, *self.followers(cell)):
                if run.digest() not in self.records:
                    yield run
        for run in (*self.joint.runs(), *self.bare, *self.costs):
            if run.digest() not in self.records:
                yield run


def _alike(run: Run) -> tuple[tuple[str, ...], ...]:
    """Groups of runs that take as long for their weight, the closest first."""
    kind = "trained" if run.kind in TRAINED else run.kind
    return (kind, run.method), (kind,), ()


def _weight(run: Run) -> float:
    """Work of a run up to a factor: examples seen in training, and a third of that for reading."""
    if run.kind not in TRAINED:
        return 100.0 + sum(target.get("test", 0) for target in run.targets or ()) / 3
    return sum(
        _trained(run.task, stage["settings"])
        for stage in run.stages or ({"settings": run.settings},)
    )


def _trained(task: dict[str, Any], settings: dict[str, Any]) -> float:
    steps, epochs = settings["max_steps"], settings["num_train_epochs"]
    batch = settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"]
    examples = steps * batch if steps else task["train"] * epochs
    return max(1.0, examples + (task["dev"] * epochs + task["test"]) / 3)
