"""The plan of a study: everything its runs depend on, resolved, and the list of runs it makes."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from deltune.errors import StudyError
from deltune.study.codec import decode
from deltune.study.settings import ModelEntry

FORMAT = 1


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

    @property
    def kind(self) -> str:
        """The spec's kind, e.g. `lora`, `full`, `sum`."""
        return self.spec["kind"]


@dataclass(frozen=True)
class Run:
    """One training run: its JSON form is its identity."""

    kind: Literal["selection", "final"]
    model: dict[str, Any]
    task: dict[str, Any]
    method: str
    spec: dict[str, Any]
    seed: int
    settings: dict[str, Any]
    format: int = FORMAT

    def to_json(self) -> dict[str, Any]:
        """The run as plain JSON data."""
        return asdict(self)

    def digest(self) -> str:
        """SHA-256 of the canonical JSON form; names the run's record."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        text = json.dumps(self.to_json(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def learning_rate(self) -> float:
        """The step size of this run."""
        return self.settings["learning_rate"]

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


@dataclass(frozen=True, slots=True)
class Plan:
    """A study resolved on this machine: `runs/` is read and written by its runs' digests."""

    name: str
    about: str
    seeds: tuple[int, ...]
    keep_deltas: bool
    models: tuple[ModelEntry, ...]
    tasks: tuple[TaskInfo, ...]
    methods: tuple[MethodInfo, ...]
    selection: dict[str, int]
    places: dict[str, str] = field(default_factory=dict)
    format: int = FORMAT

    def cells(self) -> Iterator[Cell]:
        """Every model x task x method, in order."""
        for model in self.models:
            for task in self.tasks:
                for method in self.methods:
                    yield Cell(model.name, task.name, method.name)

    def selection_runs(self, cell: Cell) -> list[Run]:
        """The runs that choose this cell's learning rate: none where there is nothing to choose."""
        method = self.method(cell.method)
        if len(method.learning_rate) == 1:
            return []
        seed = self.selection["seed"]
        return [self._run("selection", cell, seed, rate) for rate in method.learning_rate]

    def final_runs(self, cell: Cell, learning_rate: float) -> list[Run]:
        """The runs over all seeds with the chosen learning rate."""
        return [self._run("final", cell, seed, learning_rate) for seed in self.seeds]

    def method(self, name: str) -> MethodInfo:
        """The method of this name."""
        return next(method for method in self.methods if method.name == name)

    def of_kind(self, kind: str) -> MethodInfo | None:
        """The first method of a kind: `full` is the reference, `head` the floor."""
        return next((method for method in self.methods if method.kind == kind), None)

    def _run(self, kind: Literal["selection", "final"], cell: Cell, seed: int, rate: float) -> Run:
        method = self.method(cell.method)
        model = next(model for model in self.models if model.name == cell.model)
        task = next(task for task in self.tasks if task.name == cell.task)
        sizes = {"train": task.train, "dev": task.dev, "test": task.test}
        settings = method.settings
        if kind == "selection":
            sizes |= {name: min(self.selection[name], sizes[name]) for name in ("train", "dev")}
            sizes["test"] = 0
            settings = method.selection_settings
        return Run(
            kind=kind,
            model=asdict(model),
            task={"name": task.name, "digest": task.digest, "metric": task.metric, **sizes},
            method=method.name,
            spec=method.spec,
            seed=seed,
            settings={**settings, "learning_rate": rate, "seed": seed},
        )


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
    return Run(**{name: data[name] for name in (f.name for f in fields(Run))})
