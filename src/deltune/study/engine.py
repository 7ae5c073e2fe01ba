"""Runs what a study has left to run."""

import datetime
import os
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

from deltune.errors import StudyError
from deltune.study import events
from deltune.study.plan import Plan, Run, write_plan
from deltune.study.pool import Pool
from deltune.study.records import (
    PROGRESS,
    Failure,
    Record,
    locked,
    read_record,
    write_progress,
    write_record,
)
from deltune.study.state import State, Status

NOTED = 2.0
"""Seconds between notes of the progress."""
ATTEMPTS = 2
"""A run whose process is killed from outside is tried so often before it counts as failed."""


def run_study(
    plan: Plan,
    folder: str | Path,
    *,
    workers: int | None = None,
    retry_failed: bool = False,
    engine: Literal["local", "ray"] = "local",
    address: str | None = None,
    on_event: Callable[[events.Event], None] | None = None,
) -> Status:
    """Runs every run of a plan that has no record yet, in worker processes.

    A run that fails is a record too, and the study goes on. Killed at any moment and called again,
    it goes on from the records on disk: only runs in progress are lost.

    Args:
        plan: from `plan_study`.
        folder: where records, logs and the plan are kept.
        workers: processes at once; by default one per core, or one where a GPU is present.
        retry_failed: run failed runs again; their records move to `retried/`.
        engine: `local`, or `ray`: the same workers on the machines of a Ray cluster, which find
            models and tasks at the same places.
        address: of the cluster, e.g. `auto`; None starts one on this machine.
        on_event: is called with each event.

    Returns:
        The final status.

    Raises:
        StudyError: another study runs in the folder, a record cannot be written or read, or no
            worker can start.
    """
    folder = Path(folder)
    with locked(folder):
        write_plan(plan, folder)
        state = State(plan, folder)
        if retry_failed:
            state.retry_failed()
        workers = workers or default_workers()
        make = partial(_pool, engine, address)
        return _Engine(plan, folder, state, workers, on_event or (lambda event: None), make).run()


def default_workers() -> int:
    """One worker per core that this process may use; one where a GPU is present."""
    import torch

    return 1 if torch.cuda.is_available() else _cores()


def _cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


def _pool(
    engine: str, address: str | None, workers: int, threads: int, models: list[str], folder: Path
) -> Any:
    if engine == "ray":
        from deltune.study.cluster import RayPool

        return RayPool(workers, threads, models, folder, address)
    return Pool(workers, threads, models, folder)


class _Engine:
    def __init__(
        self,
        plan: Plan,
        folder: Path,
        state: State,
        workers: int,
        tell: Callable[[events.Event], None],
        make_pool: Callable[..., Any],
    ) -> None:
        self.make_pool = make_pool
        self.plan, self.folder, self.state, self.tell = plan, folder, state, tell
        # Threads change the last bits of a result: not with the number of runs that are left.
        self.threads = max(1, _cores() // workers)
        self.workers = min(workers, max(1, state.status().left))
        self.attempts: Counter[str] = Counter()
        self.noted = 0.0

    def run(self) -> Status:
        begun = time.monotonic()
        if self.state.next_run():
            self.tell(events.StudyStarted(self._status(), self.workers, self.threads))
            models = [self.plan.places.get(m.name, m.name) for m in self.plan.models]
            pool = self.make_pool(self.workers, self.threads, models, self.folder)
            try:
                while self._step(pool):
                    pass
            finally:
                pool.close()
                (self.folder / PROGRESS).unlink(missing_ok=True)
        status = self._status()
        self.tell(events.StudyEnded(status, time.monotonic() - begun))
        return status

    def _step(self, pool: Any) -> bool:
        while (worker := pool.idle()) and (run := self.state.next_run()):
            self._submit(worker, run)
        if not self.state.running and not self.state.next_run():
            return False
        for worker, message in pool.hear(timeout=0.5):
            self._heard(pool, worker, message)
        if time.monotonic() - self.noted > NOTED:
            write_progress(self.folder, self.workers, self.state.running)
            self.noted = time.monotonic()
        return True

    def _submit(self, worker: Any, run: Run) -> None:
        self.state.running[run.digest()] = 0.0
        job = {
            "digest": run.digest(),
            "run": run.to_json(),
            "places": self.plan.places,
            "folder": str(self.folder),
            "keep_delta": self.plan.keeps(run),
            "machine": {"workers": self.workers, "threads": self.threads},
        }
        worker.give(run, job)
        self.tell(events.RunStarted(run, self._status()))

    def _heard(self, pool: Any, worker: Any, message: dict[str, Any]) -> None:
        run = worker.run
        if run and message.get("digest") not in (None, run.digest()):
            return  # a word on the run before, which ended while its process still did
        match message["event"]:
            case "ready":
                worker.ready = True
            case "progress" if run:
                share = self.state.running[run.digest()] = message["share"]
                self.tell(events.RunProgress(run, share, message["dev"], self._status()))
            case "done" if run:
                if not self._ended(run):
                    self._killed(run, 0)
                worker.run = None
            case "died" if run:
                self._killed(run, message["status"])
                worker.run = None
            case "fatal":
                raise StudyError(message["message"])
            case "gone":
                if run and not self._ended(run):
                    self._killed(run, message["status"])
                pool.replace(worker)

    def _ended(self, run: Run) -> bool:
        record = read_record(self.folder, run)
        if record is None:
            return False
        self._take(record)
        return True

    def _killed(self, run: Run, status: int) -> None:
        digest = run.digest()
        self.attempts[digest] += 1
        self.state.running.pop(digest, None)
        if self.attempts[digest] < ATTEMPTS:
            return
        how = f"signal {-status}" if status < 0 else f"exit status {status}"
        message = (
            f"the process of this run ended with {how}, {ATTEMPTS} times; out of memory? "
            "See `logs/`, lower the batch size or use fewer workers"
        )
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        failure = Failure("Killed", message)
        record = Record(digest, run.to_json(), "failed", 0.0, now, failure=failure)
        write_record(self.folder, record)
        self._take(record)

    def _take(self, record: Record) -> None:
        self.state.add(record)
        self.tell(events.RunEnded(record, self._status()))
        run = record.spec
        if run.kind == "selection" and (rate := self.state.chosen(run.cell)) is not None:
            self.tell(events.RateChosen(run.cell, rate))

    def _status(self) -> Status:
        return self.state.status(self.workers)
