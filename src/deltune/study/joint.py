"""The runs of a study that find subspaces of its deltas, train codes in them and survey them.

What the methods score before any training is what codes are compared with, and can be asked at
once. A space waits for the final runs whose deltas it is made of, a code for its space, a survey
for the codes of its task.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from deltune.study.plan import Cell, Plan, Run, SubspaceInfo
from deltune.study.records import Record

Finals = Callable[[Cell], list[Run]]
DRAWN = {"random": "dense", "fastfood": "fastfood"}
"""Spaces that are drawn at random, with the kind of the draw."""
SPANNING = 3
"""So many codes span the plane that is surveyed, or two where no more methods have one."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """A space that a study asks for."""

    how: str
    dimension: int
    other: tuple[str, float | str] | None = None
    """What of it is not as in the other spaces that are found so: a field of `Ablations`, and its
    value."""

    @property
    def name(self) -> str:
        """How it is found, as the report says it."""
        if self.other is None:
            return self.how
        what, value = self.other
        return f"{self.how} ({what} {value if isinstance(value, str) else f'{value:g}'})"

    @property
    def shots(self) -> int | None:
        """Of the deltas that it is found from, where they are not those of all spaces."""
        return int(self.other[1]) if self.other and self.other[0] == "shots" else None

    def fit(self, settings: dict[str, Any]) -> dict[str, Any]:
        """The settings of its fit, out of those of the study."""
        weight = dict([self.other] if self.other and self.other[0] == "weight" else [])
        return {**settings, **weight}

    def targets(
        self, every: list[dict[str, Any]], types: Mapping[str, str]
    ) -> list[dict[str, Any]]:
        """The deltas that it is found from and tried on, out of all, given the types of tasks."""
        what, value = self.other or ("", "")
        seen = list(dict.fromkeys(t["task"]["name"] for t in every if t["seen"]))
        if what == "seen":
            seen = seen[: int(value)]
        elif what == "types":
            seen = [name for name in seen if types[name] == value]
        return [t for t in every if not t["seen"] or t["task"]["name"] in seen]


def wanted(sub: SubspaceInfo) -> list[Wanted]:
    """All spaces of a model, those that differ in one thing last."""
    every = [Wanted(how, length) for how, lengths in sub.spaces.items() for length in lengths]
    others = [(name, value) for name, some in asdict(sub.ablations).items() for value in some]
    return every + [Wanted("learned", min(sub.spaces["learned"]), other) for other in others]


class Joint:
    """What is known of the runs of `[subspace]`, given the records so far.

    Args:
        plan: of the study.
        records: by digest; read anew each time.
        finals: cell -> its final runs, once its learning rate is known.
        blocked: whether a cell has no learning rate that works.
    """

    def __init__(
        self, plan: Plan, records: Mapping[str, Record], finals: Finals,
        blocked: Callable[[Cell], bool],
    ) -> None:  # fmt: skip
        self.plan, self.records, self.finals, self.blocked = plan, records, finals, blocked
        self._made: dict[tuple[Any, ...], Run] = {}
        self._wanted: dict[str, Wanted] = {}

    @property
    def total(self) -> int:
        """How many runs there are in all."""
        sub = self.plan.subspace
        if sub is None:
            return 0
        few = sum(seen for _, seen in _cells(self.plan, sub, "")) * len(sub.ablations.shots)
        return len(self.plan.models) * (1 + few + sum(1 + self._below(one) for one in wanted(sub)))

    def runs(self) -> list[Run]:
        """The runs that are known by now, spaces before codes before surveys."""
        spaces = list(self.spaces())
        codes = [code for space in spaces for code in self.codes(space)]
        surveys = [one for space in spaces for one in self.landscapes(space)]
        return [*self.starts(), *self.few(), *spaces, *codes, *surveys]

    def lost(self) -> int:
        """How many runs can never start, because one that they wait for has failed."""
        sub, lost = self.plan.subspace, 0
        if sub is None:
            return 0
        for model in self.plan.models:
            cells = list(_cells(self.plan, sub, model.name))
            blocked = [seen for cell, seen in cells if self.blocked(cell)]
            lost += sum(blocked) * len(sub.ablations.shots)
            for one in wanted(sub):
                sources = [self._source(cell, one.shots if seen else None) for cell, seen in cells]
                if blocked or any(self._failed(run) for run in sources if run):
                    lost += 1 + self._below(one)
        for space in self.spaces():
            if self._failed(space):
                lost += self._below(self._wanted[space.digest()])
                continue
            one = self._wanted[space.digest()]
            if sub.refine:
                cells = self._decoded(space, self._asked(one))
                lost += len(self.plan.seeds) * sum(map(self.blocked, cells))
            for task in self._surveyed(one):
                cells = self._decoded(space, (task,))[:SPANNING]
                ends = [*self._marks(space, task), *filter(None, map(self._source, cells))]
                lost += any(map(self._failed, ends)) or any(map(self.blocked, cells))
        return lost

    def starts(self) -> list[Run]:
        """For each model the run that asks every method for its metric before any training: what
        the code zero of any space means."""
        sub = self.plan.subspace
        return [self._start(sub, model.name) for model in self.plan.models] if sub else []

    def few(self) -> Iterator[Run]:
        """The runs that solve the seen tasks with so few examples as a space is to know."""
        sub = self.plan.subspace
        if sub is None:
            return
        for shots in sub.ablations.shots:
            for model in self.plan.models:
                for cell, seen in _cells(self.plan, sub, model.name):
                    if seen and (run := self._source(cell, shots)):
                        yield run

    def spaces(self) -> Iterator[Run]:
        """The runs that find a space, where all deltas that it is made of are there."""
        sub = self.plan.subspace
        if sub is None:
            return
        types = {task.name: task.type for task in self.plan.tasks}
        for model in self.plan.models:
            known: dict[int | None, list[dict[str, Any]] | None] = {}
            for one in wanted(sub):
                if one.shots not in known:
                    known[one.shots] = self._targets(sub, model.name, one.shots)
                targets = known[one.shots]
                if targets is not None:
                    yield self._space(sub, model.name, one, one.targets(targets, types))

    def _targets(
        self, sub: SubspaceInfo, model: str, shots: int | None
    ) -> list[dict[str, Any]] | None:
        """All deltas that a space may be found from and tried on; None while one is missing."""
        targets = []
        for cell, seen in _cells(self.plan, sub, model):
            run = self._source(cell, shots if seen else None)
            record = self.records.get(run.digest()) if run else None
            if run is None or record is None or record.result is None:
                return None
            targets.append(
                {"task": run.task, "method": run.method, "spec": run.spec, "seen": seen,
                 "final": run.digest()}
            )  # fmt: skip
        return targets

    def codes(self, space: Run) -> list[Run]:
        """The runs that train a code in a space, seed by seed, once the space is there, and, where
        they refine it, the rate at which its method trains a delta."""
        sub = self.plan.subspace
        if sub is None or not self._finished(space):
            return []
        cells = self._decoded(space, self._asked(self._wanted[space.digest()]))
        return [
            self._code(sub, space, cell, seed)
            for seed in self.plan.seeds
            for cell in cells
            if not sub.refine or self.finals(cell)
        ]

    def called(self, space: Run) -> str:
        """How a space is found, as the report says it."""
        return self._wanted[space.digest()].name

    def landscapes(self, space: Run) -> list[Run]:
        """The runs that survey the plane of a task's codes, once the codes are there and the deltas
        of their methods that are 100 %."""
        sub = self.plan.subspace
        if sub is None or not self._finished(space):
            return []
        return [
            self._landscape(sub, space, task, codes)
            for task in self._surveyed(self._wanted[space.digest()])
            if all(map(self._finished, codes := self._marks(space, task)))
            and all(
                self._own(cell) is not None for cell in self._decoded(space, (task,))[:SPANNING]
            )
        ]

    def _asked(self, one: Wanted | None = None) -> tuple[str, ...]:
        """The tasks that codes are trained on: in a space that differs, the unseen ones alone."""
        sub = self.plan.subspace
        assert sub is not None
        if not sub.tune_seen or (one and one.other):
            return sub.unseen
        return sub.unseen + tuple(t.name for t in self.plan.tasks if t.name not in sub.unseen)

    def _surveyed(self, one: Wanted) -> tuple[str, ...]:
        """The tasks whose plane of codes is looked at."""
        sub = self.plan.subspace
        return () if sub is None or one.other else sub.landscapes

    def _below(self, one: Wanted) -> int:
        """How many runs wait for a space."""
        sub = self.plan.subspace
        assert sub is not None
        codes = len(self._asked(one)) * len(sub.decoders(one.how)) * len(self.plan.seeds)
        return codes + len(self._surveyed(one))

    def references(self, model: str, task: str) -> dict[str, list[float]]:
        """method -> test metric of its own deltas on a task, by seed."""
        sub, found = self.plan.subspace, {}
        for method in sub.methods + sub.decoded if sub else ():
            records = [self.records.get(r.digest()) for r in self.finals(Cell(model, task, method))]
            values = [r.result.test for r in records if r and r.result]
            found[method] = [value for value in values if value is not None]
        return found

    def _own(self, cell: Cell) -> float | None:
        """Test metric of the first seed's own delta of a cell; None while it is not there."""
        run = self._source(cell)
        record = self.records.get(run.digest()) if run else None
        return record.result.test if record and record.result else None

    def _decoded(self, space: Run, tasks: tuple[str, ...]) -> list[Cell]:
        """The tasks with each method that has a map in a space."""
        sub = self.plan.subspace
        methods = sub.decoders(space.settings["how"]) if sub else ()
        return [Cell(space.model["name"], task, method) for task in tasks for method in methods]

    def _marks(self, space: Run, task: str) -> list[Run]:
        """The codes of a task that span its plane: the first seed's."""
        first = self.plan.seeds[0]
        codes = [c for c in self.codes(space) if (c.task["name"], c.seed) == (task, first)]
        return codes[:SPANNING]

    def _start(self, sub: SubspaceInfo, model: str) -> Run:
        key = ("start", model)
        if key not in self._made:
            self._made[key] = Run(
                kind="start",
                model=self.plan.models_json[model],
                task={"name": ""},
                method="",
                spec={},
                seed=self.plan.seeds[0],
                settings=sub.settings,
                targets=[
                    {"task": self.plan.task(task).of_run(), "method": name,
                     "spec": self.plan.method(name).spec}
                    for task in self._asked()
                    for name in sub.methods + sub.decoded
                ],
            )  # fmt: skip
        return self._made[key]

    def _space(
        self, sub: SubspaceInfo, model: str, one: Wanted, targets: list[dict[str, Any]]
    ) -> Run:
        key = ("space", model, one, tuple(t["final"] for t in targets))
        if key not in self._made:
            settings = {**sub.settings, "how": one.how, "dimension": one.dimension}
            if one.how == "learned":
                settings["fit"] = one.fit(sub.fit)
                if sub.decoded:
                    settings["decoded"] = {n: self.plan.method(n).spec for n in sub.decoded}
            made = self._made[key] = Run(
                kind="space",
                model=self.plan.models_json[model],
                task={"name": ""},
                method=f"{one.name}, {one.dimension}",
                spec={},
                seed=self.plan.seeds[0],
                settings=settings,
                targets=targets,
            )
            self._wanted[made.digest()] = one
        return self._made[key]

    def _code(self, sub: SubspaceInfo, space: Run, cell: Cell, seed: int) -> Run:
        key = ("code", space.digest(), cell, seed)
        if key not in self._made:
            grid: dict[str, Any] = {"space": space.digest(), "grid": list(sub.learning_rate)}
            grid["seed"] = seed
            if sub.refine:
                grid["refine"] = next(r.settings for r in self.finals(cell) if r.seed == seed)
            self._made[key] = Run(
                kind="code",
                model=space.model,
                task=self.plan.task(cell.task).of_run(),
                method=cell.method,
                spec=self.plan.method(cell.method).spec,
                seed=seed,
                settings={**sub.settings, **grid},
            )
        return self._made[key]

    def _landscape(self, sub: SubspaceInfo, space: Run, task: str, codes: list[Run]) -> Run:
        key = ("landscape", space.digest(), task)
        if key not in self._made:
            self._made[key] = Run(
                kind="landscape",
                model=space.model,
                task=self.plan.task(task).of_run(),
                method=space.method,
                spec={},
                seed=space.seed,
                settings={**sub.settings, "space": space.digest(), "points": sub.points},
                targets=[
                    {"method": c.method, "code": self._vector(c), "own": self._own(c.cell)}
                    for c in codes
                ],
            )
        return self._made[key]

    def _vector(self, code: Run) -> list[float]:
        measures = self.records[code.digest()].measures or []
        return next(row["code"] for row in measures if "code" in row)

    def _source(self, cell: Cell, shots: int | None = None) -> Run | None:
        """The final run whose delta stands for a cell, or the same on fewer examples."""
        run = next(iter(self.finals(cell)), None)
        if run is None or not shots:
            return run
        key = ("few", run.digest(), shots)
        if key not in self._made:
            self._made[key] = replace(run, task={**run.task, "shots": shots})
        return self._made[key]

    def _finished(self, run: Run) -> bool:
        record = self.records.get(run.digest())
        return record is not None and record.status == "finished"

    def _failed(self, run: Run) -> bool:
        record = self.records.get(run.digest())
        return record is not None and record.status == "failed"


def _cells(plan: Plan, sub: SubspaceInfo, model: str) -> Iterator[tuple[Cell, bool]]:
    """Every cell whose delta is looked at, and whether the space may see it."""
    for task in plan.tasks:
        for method in sub.methods:
            yield Cell(model, task.name, method), task.name not in sub.unseen
