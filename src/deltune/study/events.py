"""What a running study says; the command line draws it."""

from dataclasses import dataclass

from deltune.study.plan import Cell, Run
from deltune.study.records import Record
from deltune.study.state import Status


@dataclass(frozen=True, slots=True)
class StudyStarted:
    """The workers are starting."""

    status: Status
    workers: int
    threads: int


@dataclass(frozen=True, slots=True)
class RunStarted:
    """A worker took a run."""

    run: Run
    status: Status


@dataclass(frozen=True, slots=True)
class RunProgress:
    """A run is at this share of its training; `dev` is its last dev metric."""

    run: Run
    share: float
    dev: float | None
    status: Status


@dataclass(frozen=True, slots=True)
class RunEnded:
    """A run finished or failed, and its record is on disk."""

    record: Record
    status: Status


@dataclass(frozen=True, slots=True)
class RateChosen:
    """The dev split chose a learning rate."""

    cell: Cell
    learning_rate: float


@dataclass(frozen=True, slots=True)
class StudyEnded:
    """Nothing is left to run."""

    status: Status
    seconds: float


Event = StudyStarted | RunStarted | RunProgress | RunEnded | RateChosen | StudyEnded
