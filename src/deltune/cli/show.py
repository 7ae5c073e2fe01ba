"""What the commands show: tables, progress with time left, JSON."""

import dataclasses
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from deltune.study import events as study
from deltune.study import numbers
from deltune.study.plan import TRAINED, Run
from deltune.training import events as train

WIDE = 1000
"""Columns of what is no terminal."""


def out() -> Console:
    """Standard output, for results; a file or a pipe takes lines of any length."""
    width = None if sys.stdout.isatty() else WIDE
    return Console(soft_wrap=True, highlight=False, width=width)


def err() -> Console:
    """Standard error, for progress."""
    return Console(stderr=True, soft_wrap=True, highlight=False)


def say_json(data: object) -> None:
    """Writes data as JSON to standard output."""
    json.dump(data, sys.stdout, indent=1, default=_plain)
    sys.stdout.write("\n")


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    right: Sequence[int] = (),
    wrap: Sequence[int] = (),
) -> Table:
    """A table of texts; columns are numbered, those in `right` flush right."""
    made = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for number, name in enumerate(columns):
        made.add_column(
            name, justify="right" if number in right else "left", no_wrap=number not in wrap
        )
    for row in rows:
        made.add_row(*row)
    return made


class _Bar:
    """Bars on standard error, drawn inside a `with` block."""

    def __init__(self, *columns: ProgressColumn, terminal_only: bool, quiet: bool) -> None:
        console = err()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            *columns,
            console=console,
            disable=quiet or (terminal_only and not console.is_terminal),
        )

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()


class TrainingBar(_Bar):
    """Draws the events of training runs.

    Args:
        names: of the runs.
        quiet: draw nothing.
    """

    def __init__(self, names: Sequence[str] = ("training",), quiet: bool = False) -> None:
        super().__init__(
            TextColumn("loss {task.fields[loss]}  {task.fields[dev]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            terminal_only=False,
            quiet=quiet,
        )
        self._names = names
        self._tasks: dict[int, TaskID] = {}

    def __call__(self, event: train.Event, run: int = 0) -> None:
        task = self._tasks.get(run, TaskID(run))
        match event:
            case train.Started():
                self._tasks[run] = self._progress.add_task(
                    self._names[run], total=event.steps, completed=event.resumed_at, loss="–",
                    dev="",
                )  # fmt: skip
            case train.Noted():
                self._progress.console.print(f"note: {event.text}", markup=False)
            case train.Step():
                self._progress.update(task, completed=event.step, loss=f"{event.loss:.3f}")
            case train.Evaluated():
                mark = " (best)" if event.best else ""
                dev = f"{event.split} {event.metric} {event.value:.3f}{mark}"
                self._progress.update(task, dev=dev)


class Counter(_Bar):
    """Draws how many of a known number are done."""

    def __init__(self, what: str, quiet: bool = False) -> None:
        super().__init__(
            TextColumn("left"), TimeRemainingColumn(), terminal_only=False, quiet=quiet
        )
        self._task = self._progress.add_task(what, total=None)

    def __call__(self, done: int, total: int) -> None:
        self._progress.update(self._task, completed=done, total=total)


class StudyBar(_Bar):
    """Draws the events of a study: a bar, or lines where nobody watches."""

    def __init__(self, quiet: bool = False) -> None:
        left = TextColumn("{task.fields[left]}")
        super().__init__(TimeElapsedColumn(), left, terminal_only=True, quiet=quiet)
        self._quiet = quiet
        self._task = self._progress.add_task("study", total=None, left="")
        self._running: dict[str, TaskID] = {}

    def __call__(self, event: study.Event) -> None:
        match event:
            case study.StudyStarted():
                self._line(
                    f"{event.status.name}: {event.status.left} of {event.status.total} runs to do, "
                    f"{event.workers} at once with {event.threads} threads each"
                )
            case study.RunStarted():
                task = self._progress.add_task(
                    escape(f"  {name_of(event.run)}"), total=100, left=""
                )
                self._running[event.run.digest()] = task
            case study.RunProgress():
                dev = "" if event.dev is None else f"dev {event.dev:.3f}"
                task = self._running[event.run.digest()]
                self._progress.update(task, completed=int(100 * event.share), left=dev)
            case study.RunEnded():
                self._ended(event)
            case study.RateChosen():
                rate = numbers.rate(event.learning_rate)
                self._line(f"  {event.cell.method}: learning rate {rate} chosen on dev")
        if not isinstance(event, study.RateChosen):
            self._count(event.status)

    def _ended(self, event: study.RunEnded) -> None:
        record, status = event.record, event.status
        task = self._running.pop(record.digest, None)
        if task is not None:
            self._progress.remove_task(task)
        if record.failure:
            what = f"failed: {record.failure.message.splitlines()[0]}"
        elif record.result and record.result.test is not None:
            what = f"test {record.result.test:.3f}"
        elif record.result:
            what = f"dev {record.result.dev:.3f}"
        else:
            what = f"{len(record.measures or ())} values"
        share = f"{status.finished + status.failed}/{status.total}"
        self._line(f"{share} {name_of(record.spec)}: {what}, {numbers.seconds(record.seconds)}")

    def _count(self, status: Any) -> None:
        left = status.seconds_left
        words = "" if left is None else f"about {numbers.seconds(left)} left"
        done = status.finished + status.failed
        self._progress.update(self._task, total=status.total, completed=done, left=words)

    def _line(self, words: str) -> None:
        if not self._quiet:
            self._progress.console.print(words, markup=False)


def name_of(run: Run) -> str:
    """A run in a few words."""
    task = Path(run.task["name"]).name
    if run.kind not in TRAINED:
        what = {
            "transfer": f"of {task} on other tasks" if task else "of the model as it is",
            "cost": "of all methods",
            "start": "of all methods before training",
            "code": f"on {task} (seed {run.seed})",
            "landscape": f"of {task}",
        }
        return f"{run.method} {run.kind} {what.get(run.kind, '')}".strip()
    rate = numbers.rate(run.learning_rate)
    kind = "choosing rate, " if run.kind == "selection" else ""
    return f"{run.method} on {task} ({kind}seed {run.seed}, rate {rate})"


def _plain(value: object) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return dict(value)
    return str(value)
