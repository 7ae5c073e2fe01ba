"""The plan of a study: everything its runs depend on, resolved, and the list of runs it makes."""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from deltune.errors import StudyError
from deltune.study.codec import decode
from deltune.study.settings import Ablations
from deltune.tasks.metrics import CORRELATIONS

FORMAT = 1


Kind = Literal[
    "selection", "final", "transfer", "cost", "memory", "start", "space", "code", "landscape"
]
TRAINED = ("selection", "final")
"""Kinds of runs that train; the others measure."""
HEADLESS = ("embedding", "causal", "seq2seq")
"""Heads that answer without training."""
ALONE = ("cost", "memory")
"""Kinds of runs beside which no other may run."""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """A model of the study: what it is called and how it is loaded."""

    name: str
    head: str = "auto"
    dtype: str = "float32"
    layers: int | None = None
    pretrained: bool | None = None
    """False for random weights."""
    source: str | None = None
    """What the study file names it by, where that is not its name."""
    attention: str | None = None
    """What computes its attention, where that is stated."""


@dataclass(frozen=True, slots=True)
class TaskInfo:
    """A task as the study found it: its identity is its records, not the place they lie in."""

    name: str
    title: str
    kind: str
    metric: str
    digest: str
    labels: tuple[str, ...] | None
    train: int
    dev: int
    test: int
    type: str = "other"
    chance: float = 0.0
    """Test metric of guessing: see `Task.chance`."""
    template: str | None = None
    shots: int | None = None
    selection: dict[str, int] | None = None
    """Sizes of its selection runs, where it has its own."""

    @property
    def floor(self) -> float:
        """What a test metric must exceed to be told from guessing: chance and two standard errors,
        of a share of so many examples or, where the metric is a correlation, of one of 0."""
        if self.metric in CORRELATIONS:
            return self.chance + 2 / math.sqrt(max(1, self.test))
        return self.chance + 2 * math.sqrt(self.chance * (1 - self.chance) / max(1, self.test))

    def of_run(self, **sizes: int) -> dict[str, Any]:
        """What of a task decides a run."""
        whole = {"train": self.train, "dev": self.dev, "test": self.test} | sizes
        known = {"name": self.name, "digest": self.digest, "metric": self.metric}
        return _stated({**known, **whole, "template": self.template, "shots": self.shots})


@dataclass(frozen=True, slots=True)
class MethodInfo:
    """A method with its spec in canonical form and its complete train settings."""

    name: str
    text: str
    spec: dict[str, Any]
    learning_rate: tuple[float, ...]
    settings: dict[str, Any]
    selection_settings: dict[str, Any]
    family: str = ""
    note: str = ""
    stages: tuple[str, ...] = ()
    """Methods that are trained one after another instead."""
    parts: tuple[str, ...] | None = None
    """Which parts of the combination are in it; None outside of one."""

    @property
    def kind(self) -> str:
        """The spec's kind, e.g. `lora`, `full`, `sum`; a head beside it, which may have a rate of
        its own, does not make it another."""
        return self.main["kind"]

    @property
    def main(self) -> dict[str, Any]:
        """The spec, without a head beside it."""
        found = [part for part in self.spec.get("parts", ()) if part["kind"] != "head"]
        return found[0] if len(found) == 1 else self.spec


@dataclass(frozen=True, slots=True)
class SubspaceInfo:
    """The subspaces of a study: see `deltune.study.joint`."""

    unseen: tuple[str, ...]
    methods: tuple[str, ...]
    spaces: dict[str, list[int]]
    learning_rate: tuple[float, ...]
    settings: dict[str, Any]
    """Complete train settings of the codes."""
    fit: dict[str, Any]
    """Complete settings of learned spaces."""
    landscapes: tuple[str, ...] = ()
    points: int = 15
    decoded: tuple[str, ...] = ()
    tune_seen: bool = False
    refine: bool = False
    ablations: Ablations = field(default_factory=Ablations)

    def decoders(self, how: str) -> tuple[str, ...]:
        """The methods that have a map in a space that was found so."""
        return self.methods + (self.decoded if how == "learned" else ())


@dataclass(frozen=True)
class Run:
    """One run: its JSON form is its identity."""

    kind: Kind
    model: dict[str, Any]
    task: dict[str, Any]
    method: str
    spec: dict[str, Any]
    seed: int
    settings: dict[str, Any]
    format: int = FORMAT
    stages: list[dict[str, Any]] | None = None
    """Spec and settings of each stage, where there are several."""
    targets: list[dict[str, Any]] | None = None
    """Tasks that a delta is tried on, or methods whose cost is measured."""

    def to_json(self) -> dict[str, Any]:
        """The run as plain JSON data."""
        return _stated(asdict(self))

    def digest(self) -> str:
        """SHA-256 of the canonical JSON form; names the run's record."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        text = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def needs(self) -> list[str]:
        """What the run reads in the folder of the study, beside what it makes."""
        if self.kind == "transfer" and "final" in self.settings:
            return [f"deltas/{self.settings['final']}"]
        if self.kind == "space":
            return [f"deltas/{target['final']}" for target in self.targets or ()]
        if self.kind in ("code", "landscape"):
            return [f"spaces/{self.settings['space']}"]
        return []

    @property
    def learning_rate(self) -> float:
        """The step size of this run; 0 where nothing is trained."""
        return self.settings.get("learning_rate", 0.0)

    @property
    def cell(self) -> "Cell":
        """The model, task and method that this run belongs to."""
        return Cell(self.model["name"], self.task["name"], self.method)


@dataclass(frozen=True, slots=True)
class Cell:
    """A model, a task and a method: what one learning rate is chosen for."""

    model: str
    task: str
    method: str


@dataclass(frozen=True)
class Plan:
    """A study resolved on this machine: `runs/` is read and written by its runs' digests."""

    name: str
    about: str
    seeds: tuple[int, ...]
    keep_deltas: bool
    models: tuple[ModelInfo, ...]
    tasks: tuple[TaskInfo, ...]
    methods: tuple[MethodInfo, ...]
    selection: dict[str, int]
    places: dict[str, str] = field(default_factory=dict)
    format: int = FORMAT
    pilots: tuple[str, ...] = ()
    train_metric: bool = False
    transferred: tuple[str, ...] = ()
    """Methods whose deltas are tried on the other tasks."""
    cost: dict[str, list[int]] | None = None
    """`lengths`, `batch_sizes` and `rounds` (one number) of the cost measurement."""
    subspace: SubspaceInfo | None = None

    def cells(self) -> Iterator[Cell]:
        """Every model x task x method, in order."""
        for model in self.models:
            for task in self.tasks:
                for method in self.methods:
                    yield Cell(model.name, task.name, method.name)

    def pilots_of(self, cell: Cell) -> list[Cell]:
        """The cells whose selection runs choose the learning rate of this one."""
        if not self.pilots:
            return [cell]
        kind = self.task(cell.task).kind
        alike = [name for name in self.pilots if self.task(name).kind == kind]
        return [Cell(cell.model, name, cell.method) for name in alike or self.pilots]

    def selection_runs(self, cell: Cell) -> list[Run]:
        """The runs on this cell that choose a learning rate: none where there is nothing to
        choose, or where other tasks are the pilots."""
        method = self.method(cell.method)
        if len(method.learning_rate) < 2 or (self.pilots and cell.task not in self.pilots):
            return []
        seed = self.selection["seed"]
        return [self._trained("selection", cell, seed, (rate,)) for rate in method.learning_rate]

    def final_runs(self, cell: Cell, *rates: float) -> list[Run]:
        """The runs over all seeds with the chosen learning rate, one for each stage."""
        return [self._trained("final", cell, seed, rates) for seed in self.seeds_of(cell.task)]

    def seeds_of(self, task: str) -> tuple[int, ...]:
        """The seeds of a task's final runs: the first alone where a subspace is made of them and
        nothing else is asked of them."""
        sub = self.subspace
        once = sub is not None and task not in sub.unseen and not sub.tune_seen
        return self.seeds[:1] if once else self.seeds

    def keeps(self, run: Run) -> bool:
        """Whether the delta of a run is kept in `deltas/`."""
        if run.kind != "final":
            return False
        joint = self.subspace is not None and run.method in self.subspace.methods
        first = joint and run.seed == self.seeds[0]
        return self.keep_deltas or first or self.transfer_run(run) is not None

    def transfer_run(self, final: Run) -> Run | None:
        """The run that tries the delta of a final run on every other task."""
        if final.method not in self.transferred or final.seed != self.seeds[0]:
            return None
        others = [task.of_run() for task in self.tasks if task.name != final.task["name"]]
        about = {**final.settings, "final": final.digest()}
        return replace(final, kind="transfer", settings=about, targets=others)

    def bare_runs(self) -> list[Run]:
        """The runs that ask each model as it is what transferred deltas are asked, where a model
        without training can be asked: it has no new head."""
        if not self.transferred:
            return []
        method, seed = self.method(self.transferred[0]), self.seeds[0]
        settings = {**method.settings, "seed": seed}
        every = [task.of_run() for task in self.tasks]
        return [
            Run("transfer", self.models_json[model.name], {"name": ""}, "", {}, seed, settings,
                targets=every)
            for model in self.models if model.head in HEADLESS
        ]  # fmt: skip

    def cost_runs(self) -> list[Run]:
        """The runs that measure times, all methods in turn, and the memory of each method."""
        if self.cost is None:
            return []
        plain = [method for method in self.methods if not method.stages]
        found = []
        every = [{"method": method.name, "spec": method.spec} for method in plain]
        times = {"lengths": self.cost["lengths"], "rounds": self.cost["rounds"][0]}
        length, sizes = max(self.cost["lengths"]), self.cost["batch_sizes"]
        for model in self.models_json.values():
            whole: dict[str, Any] = {"model": model, "task": {"name": ""}, "seed": self.seeds[0]}
            found.append(Run("cost", method="", spec={}, settings=times, targets=every, **whole))
            memory = {"length": length, "batch_sizes": sizes}
            found += [
                Run("memory", method=method.name, spec=method.spec, settings=memory, **whole)
                for method in plain
            ]
        return found

    def method(self, name: str) -> MethodInfo:
        """The method of this name."""
        return self._methods[name]

    def task(self, name: str) -> TaskInfo:
        """The task of this name."""
        return self._tasks[name]

    def of_kind(self, kind: str) -> MethodInfo | None:
        """The first method of a kind: `full` is the reference, `head` the floor."""
        return next((method for method in self.methods if method.kind == kind), None)

    @cached_property
    def _methods(self) -> dict[str, MethodInfo]:
        return {method.name: method for method in self.methods}

    @cached_property
    def _tasks(self) -> dict[str, TaskInfo]:
        return {task.name: task for task in self.tasks}

    @cached_property
    def models_json(self) -> dict[str, dict[str, Any]]:
        """name -> what of a model decides a run."""
        return {model.name: _stated(asdict(model)) for model in self.models}

    def _trained(
        self, kind: Literal["selection", "final"], cell: Cell, seed: int, rates: tuple[float, ...]
    ) -> Run:
        method, task = self.method(cell.method), self.task(cell.task)
        sizes: dict[str, int] = {}
        chosen = method.selection_settings if kind == "selection" else method.settings
        if kind == "selection":
            wanted = self.selection | (task.selection or {})
            sizes = {name: min(wanted[name], getattr(task, name)) for name in ("train", "dev")}
            sizes["test"] = 0
        settings = {**chosen, "learning_rate": rates[0], "seed": seed}
        if kind == "final" and self.train_metric:
            settings["train_metric"] = True
        return Run(
            kind=kind,
            model=self.models_json[cell.model],
            task=task.of_run(**sizes),
            method=method.name,
            spec=method.spec,
            seed=seed,
            settings=settings,
            stages=[
                {"spec": one.spec, "settings": {**one.settings, "learning_rate": rate}}
                for one, rate in zip(map(self.method, method.stages), rates, strict=True)
            ]
            if method.stages
            else None,
        )


def _stated(table: dict[str, Any]) -> dict[str, Any]:
    """A table without what is not given: a new option leaves the runs without it what they were."""
    return {name: value for name, value in table.items() if value is not None}


def write_plan(plan: Plan, folder: Path) -> None:
    """Writes the plan to `study.json`, which status and report read."""
    from deltune.study.records import write_atomic

    write_atomic(folder / "study.json", json.dumps(asdict(plan), indent=1) + "\n")


def read_plan(folder: str | Path) -> Plan:
    """The plan of a study folder.

    Raises:
        StudyError: the folder holds no study, or one of another format.
    """
    path = Path(folder) / "study.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise StudyError(
            f"`{folder}` holds no study (no study.json); start one there with `deltune study run`"
        ) from None
    except ValueError as error:
        raise StudyError(
            f"`{path}` is damaged: {error}; run the study again, its finished runs are kept"
        ) from None
    if not isinstance(data, Mapping) or data.get("format") != FORMAT:
        raise StudyError(
            f"`{path}` is not of format {FORMAT}; run the study again with this version"
        )
    return decode(Plan, data, "study.json:")


def run_from_json(data: Mapping[str, Any]) -> Run:
    """The run of `Run.to_json`."""
    return Run(**{f.name: data[f.name] for f in fields(Run) if f.name in data})
