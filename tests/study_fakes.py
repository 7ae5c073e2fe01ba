"""A study without models: made-up plans, and a worker whose runs only sleep and write records."""

import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

from deltune.study.plan import (
    TRAINED,
    MethodInfo,
    ModelInfo,
    Plan,
    Run,
    TaskInfo,
    run_from_json,
)
from deltune.study.records import Failure, Record, Result, write_record

SETTINGS = {
    "max_steps": None,
    "num_train_epochs": 3.0,
    "per_device_train_batch_size": 32,
    "gradient_accumulation_steps": 1,
}
FAMILIES = {"full": "baseline", "head": "baseline", "last": "baseline"}


def make_method(name: str, kind: str, rates: tuple[float, ...] = (1e-3,), **other) -> MethodInfo:
    family = FAMILIES.get(kind, "addition")
    return MethodInfo(name, kind, {"kind": kind}, rates, SETTINGS, SETTINGS, family=family, **other)


def make_plan(methods: list[MethodInfo], seeds: tuple[int, ...] = (0, 1), **other) -> Plan:
    task = TaskInfo("toy", "Toy", "classification", "accuracy", "0" * 64, ("a", "b"), 96, 50, 60)
    models = (ModelInfo("tiny"),)
    selection = {"train": 32, "dev": 20, "seed": 0}
    return Plan(
        "A study", "About.", seeds, False, models, (task,), tuple(methods), selection, **other
    )


def make_result(
    test: float | None,
    *,
    dev: float = 0.7,
    curve: tuple[float, ...] = (0.6, 0.7, 0.69),
    losses: tuple[float, ...] = (0.7, 0.6, 0.5, 0.4),
    trainable: int = 1000,
    saved: int = 4000,
    seconds: float = 3.0,
    peak: int = 700_000_000,
) -> Result:
    points = [[10 * (k + 1), seconds * (k + 1) / len(curve), v] for k, v in enumerate(curve)]
    steps = 10 * len(curve)
    memory = {"peak_memory_bytes": peak, "start_memory_bytes": 500_000_000}
    times = {"train_seconds": seconds, "eval_seconds": 0.5, "load_seconds": 0.1}
    return Result(
        dev, test, 20, steps, 3.0, "done", points, list(losses), trainable, trainable, 22_000_000,
        saved, **memory, **times,
    )  # fmt: skip


def make_record(
    run: Run,
    result: Result | None,
    failure: Failure | None = None,
    measures: list[dict[str, Any]] | None = None,
) -> Record:
    status = "failed" if failure else "finished"
    machine = {"processor": "Abacus", "cores": 2, "versions": {"deltune": "0"}, "python": "3"}
    machine |= {"memory_bytes": 8_000_000_000, "workers": 2, "threads": 1, "system": "Linux 6"}
    ended = "2026-01-01T00:00:00+00:00"
    return Record(
        run.digest(), run.to_json(), status, 4.0, ended, result, failure, machine, measures
    )


def fake_dev(run: Run) -> float:
    """Best at 1e-3, falling off with every decade of the learning rate."""
    from math import log10

    return round(0.8 - 0.1 * abs(log10(run.learning_rate) + 3), 3)


def _run_job(job: dict, tell) -> None:
    run = run_from_json(job["run"])
    folder = Path(job["folder"])
    with (folder / "begun.txt").open("a") as file:
        file.write(f"{run.digest()} {os.getpid()} {os.environ['OMP_NUM_THREADS']}\n")
    tell({"event": "progress", "digest": run.digest(), "share": 0.5, "dev": 0.5})
    busy = folder / f"busy.{os.getpid()}"
    busy.touch()
    time.sleep(float(os.environ.get("FAKE_SECONDS", "0.05")))
    busy.unlink()
    if run.method == "Sleeps":
        time.sleep(60)
    if run.method == "Dies":
        os.kill(os.getpid(), signal.SIGKILL)
    failure = result = measures = None
    if run.kind not in TRAINED:
        measures = [{"running": len(list(folder.glob("busy.*")))}]
    elif run.method == "Fails" or (run.method == "High fails" and run.learning_rate > 1e-2):
        failure = Failure("TrainError", "the loss is NaN")
    else:
        result = make_result(None if run.kind == "selection" else 0.75, dev=fake_dev(run))
    write_record(folder, make_record(run, result, failure, measures))
    tell({"event": "done", "digest": run.digest(), "status": "finished"})
    time.sleep(float(os.environ.get("FAKE_LINGERS", "0")))


def serve() -> None:
    """Is the worker, with `_run_job` in the place of the real one."""
    fake = types.ModuleType("deltune.study.execute")
    fake.__dict__.update(warm_up=lambda models: None, run_job=_run_job)
    sys.modules["deltune.study.execute"] = fake
    from deltune.study.worker import main

    main()


def rechecked(folder: Path) -> subprocess.CompletedProcess[str]:
    """The program that recomputes a report from its records has been over a study."""
    script = Path(__file__).parents[1] / "docs" / "studies" / "recheck.py"
    command = [sys.executable, str(script), str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def study(folder: str, plan_json: str) -> None:
    """Is a study in its own process, so that it can be killed."""
    from deltune.study import pool
    from deltune.study.engine import run_study

    pool.COMMAND[:] = [sys.executable, __file__]
    run_study(plan_from(json.loads(plan_json)), folder, workers=2)


def plan_from(data: dict) -> Plan:
    from deltune.study.codec import decode

    return decode(Plan, data, "plan")


if __name__ == "__main__":
    study(*sys.argv[1:]) if len(sys.argv) > 1 else serve()
