"""`deltune study` and `deltune quickstart`: compare methods and write the report."""

import time
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, subcommand

from deltune.cli import show
from deltune.errors import StudyError
from deltune.study import numbers
from deltune.study.plan import read_plan
from deltune.study.records import read_progress
from deltune.study.state import State, Status
from deltune.study.summary import Table, tables, to_json


@dataclass(frozen=True)
class Run:
    """Run what a study has left to run, then write its report.

    Killed at any moment and started again it goes on; nothing finished is lost.
    """

    file: Positional[Path]
    """The study file, e.g. study.toml."""
    out: Path | None = None
    """Folder for records and report; by default one beside the file, named after it."""
    workers: int | None = None
    """Runs at once; by default one per core, or one where a GPU is present."""
    retry_failed: bool = False
    """Run failed runs again."""
    engine: Literal["local", "ray"] = "local"
    """`ray`: on the machines of a Ray cluster, where models and tasks lie at the same places."""
    address: str | None = None
    """Of the Ray cluster, e.g. auto; by default one is started on this machine."""
    json: bool = False
    """Write the result as JSON to standard output."""

    def run(self) -> None:
        """Runs the study."""
        folder = self.out or self.file.with_suffix("")
        own = {"engine": self.engine, "address": self.address}
        _run(self.file, folder, self.workers, self.retry_failed, self.json, **own)


@dataclass(frozen=True)
class StatusOf:
    """Show how far a study is, also while it is running elsewhere."""

    folder: Positional[Path]
    """The folder of the study."""
    watch: bool = False
    """Show it again every few seconds until nothing is left to run."""
    json: bool = False
    """Write JSON to standard output."""

    def run(self) -> None:
        """Prints the counts."""
        while True:
            status = _status(self.folder)
            if self.json:
                show.say_json(status)
            else:
                show.out().print(_status_line(status))
            if not self.watch or status.done or not status.running:
                return
            time.sleep(5)


@dataclass(frozen=True)
class Report:
    """Write report.html from what has finished so far, and print the table."""

    folder: Positional[Path]
    """The folder of the study."""
    json: bool = False
    """Write the table as JSON to standard output."""

    def run(self) -> None:
        """Writes the report."""
        _report(self.folder, self.json)


@dataclass(frozen=True)
class Query:
    """Ask the records of a study in SQL.

    `runs` has one row for each record, `curves` one for each evaluation; `DESCRIBE runs` lists the
    columns. Runs that choose a learning rate have the kind `selection`, the others `final`.
    """

    folder: Positional[Path]
    """The folder of the study."""
    sql: Positional[str]
    """E.g. "SELECT method, avg(test) FROM runs WHERE kind = 'final' GROUP BY 1 ORDER BY 2"."""
    json: bool = False
    """Write JSON to standard output."""

    def run(self) -> None:
        """Prints what the query gives."""
        from deltune.study.query import query

        names, rows = query(self.folder, self.sql)
        if self.json:
            show.say_json([dict(zip(names, row, strict=True)) for row in rows])
        elif names:
            texts = [["–" if value is None else str(value) for value in row] for row in rows]
            show.out().print(show.table(names, texts))


@dataclass(frozen=True)
class Export:
    """Write the records of a study as one table to a Parquet or CSV file."""

    folder: Positional[Path]
    """The folder of the study."""
    file: Positional[Path]
    """The file, whose name ends in .parquet or .csv."""
    table: str = "runs"
    """`runs`, or `curves` for the evaluations of each run."""

    def run(self) -> None:
        """Writes the file."""
        from deltune.study.query import export

        show.out().print(f"written: {export(self.folder, self.file, self.table).resolve()}")


@dataclass(frozen=True)
class Figures:
    """Write each figure of the report to a file of its own, for papers."""

    folder: Positional[Path]
    """The folder of the study."""
    out: Path | None = None
    """Folder of the files; by default `figures` in that of the study."""
    form: Literal["pdf", "svg"] = "pdf"
    """What the files are."""

    def run(self) -> None:
        """Writes the files."""
        from deltune.study.drawings import write_figures

        for path in write_figures(self.folder, self.out or self.folder / "figures", self.form):
            show.out().print(f"written: {path.resolve()}", markup=False)


@dataclass(frozen=True)
class Study:
    """Compare methods on models and tasks: run, status, report, figures, query, export."""

    verb: (
        Annotated[Run, subcommand("run")]
        | Annotated[StatusOf, subcommand("status")]
        | Annotated[Report, subcommand("report")]
        | Annotated[Figures, subcommand("figures")]
        | Annotated[Query, subcommand("query")]
        | Annotated[Export, subcommand("export")]
    )

    def run(self) -> None:
        """Runs the chosen verb."""
        self.verb.run()


@dataclass(frozen=True)
class Quickstart:
    """Compare ten ways to adapt a small sentence encoder on real movie reviews.

    Needs at most eight minutes on two cores. Stopped and started again it goes on.
    """

    out: Path = Path("quickstart")
    """Folder for records and report."""
    workers: int | None = None
    """Runs at once; by default one per core, or one where a GPU is present."""
    retry_failed: bool = False
    """Run failed runs again."""
    json: bool = False
    """Write the result as JSON to standard output."""

    def run(self) -> None:
        """Runs the packaged study."""
        with as_file(files("deltune.study") / "quickstart.toml") as file:
            _run(file, self.out, self.workers, self.retry_failed, self.json)


def _run(
    file: Path, folder: Path, workers: int | None, retry: bool, json: bool, **engine: Any
) -> None:
    if workers is not None and workers < 1:
        raise StudyError(f"--workers is {workers}; give 1 or more")
    from deltune.study.engine import run_study
    from deltune.study.resolve import plan_study

    plan = plan_study(file)
    with show.StudyBar(quiet=json) as bar:
        run_study(plan, folder, workers=workers, retry_failed=retry, on_event=bar, **engine)
    _report(folder, json)


def _report(folder: Path, json: bool) -> None:
    from deltune.study.report import write_report

    path = write_report(folder)
    state = State(read_plan(folder), folder)
    if json:
        show.say_json(
            {"report": str(path), "status": state.status(), "tables": to_json(tables(state))}
        )
        return
    for table in tables(state):
        _print_table(table)
    console = show.out()
    for record in state.failures():
        message = record.failure.message if record.failure else ""
        console.print(f"failed: {show.name_of(record.spec)}: {message}", markup=False)
    if not state.status().done:
        console.print(_status_line(state.status()))
    console.print(f"report: {path.resolve()}", markup=False)


def _print_table(table: Table) -> None:
    from deltune.study.page.findings import shortfalls

    console = show.out()
    console.print(f"\n{table.model} on {table.task.title}", style="bold", markup=False)
    rows = []
    for row in table.rows:
        relative = table.relative(row)
        rows.append(
            (
                row.name,
                numbers.metric(row.test, row.test_spread),
                "–" if relative is None else numbers.percent(relative),
                numbers.number(row.trainable),
                numbers.size(row.saved),
                numbers.seconds(row.seconds),
                numbers.size(row.peak),
                numbers.rate(row.learning_rate),
            )
        )
    columns = ("method", table.task.metric, "of full", "trained", "saved", "time")
    columns += ("memory", "rate")
    console.print(show.table(columns, rows, right=range(1, len(columns))))
    for one in shortfalls(table):
        console.print(f"warning: {one.method} does not beat head-only: {one.text}", markup=False)


def _status(folder: Path) -> Status:
    state = State(read_plan(folder), folder)
    workers, running = read_progress(folder)
    state.running = {d: share for d, share in running.items() if d not in state.records}
    return state.status(workers)


def _status_line(status: Status) -> str:
    parts = [f"{status.finished} finished", f"{status.failed} failed", f"{status.left} left"]
    if status.running:
        parts.insert(2, f"{status.running} running")
    if status.blocked:
        parts.append(f"{status.blocked} blocked by failed selections")
    if (status.left or status.running) and status.seconds_left is not None:
        whose = "" if status.running else " of one worker's time"
        parts.append(f"about {numbers.seconds(status.seconds_left)} left{whose}")
    return f"{status.name}: {status.total} runs: " + ", ".join(parts)
