"""One run, in the process that was made for it: load, attach, train, test, measure, record."""

import contextlib
import dataclasses
import datetime
import importlib
import shutil
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import deltune as dt
from deltune.errors import DeltuneError, StudyError
from deltune.spec import from_json
from deltune.study.machine import best_device, describe_machine, resident_bytes
from deltune.study.plan import Run, run_from_json
from deltune.study.records import Failure, Record, Result, write_record
from deltune.study.resolve import digest_task
from deltune.tasks.models import load_model
from deltune.tasks.packages import find_model
from deltune.tasks.records import Task, load_task
from deltune.training.events import Evaluated, Event, Step
from deltune.training.loop import evaluate, train
from deltune.training.settings import TrainSettings

Tell = Callable[[dict[str, Any]], None]


WARM = ("deltune.tasks.objectives", "sklearn.metrics", "transformers.modeling_utils")


def warm_up(models: list[str]) -> None:
    """Imports what the runs will import, the models' own modules included; computes nothing."""
    from transformers import AutoConfig

    for module in (*WARM, "transformers.models.auto.modeling_auto"):
        importlib.import_module(module)
    for place in models:
        # What is wrong with a model is told by its runs.
        with contextlib.suppress(Exception):
            files = find_model(place)
            config = AutoConfig.from_pretrained(files.where, **files.options)
            name = type(config).__module__.replace(".configuration_", ".modeling_")
            importlib.import_module(name)


def run_job(job: dict[str, Any], tell: Tell) -> None:
    """Runs a job of the study and writes its record, whatever happens in the run.

    Raises:
        StudyError: the record cannot be written.
    """
    run = run_from_json(job["run"])
    folder = Path(job["folder"])
    begun = time.monotonic()
    torch.set_num_threads(job["machine"]["threads"])
    result, failure = None, None
    try:
        result = _result(run, job["places"], folder, job["keep_delta"], _teller(run, tell))
    except Exception as error:
        # What a user's model, data or settings make of a run is the run's outcome, not ours.
        text = "" if isinstance(error, DeltuneError) else traceback.format_exc()
        failure = Failure(type(error).__name__, str(error), text)
    record = Record(
        digest=run.digest(),
        run=run.to_json(),
        status="finished" if result else "failed",
        seconds=time.monotonic() - begun,
        ended=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        result=result,
        failure=failure,
        machine=describe_machine() | job["machine"],
    )
    write_record(folder, record)
    tell({"event": "done", "digest": record.digest, "status": record.status})


def _result(
    run: Run, places: dict[str, str], folder: Path, keep: bool, on_event: Callable[[Event], None]
) -> Result:
    begun = time.monotonic()
    task = _task(run, places[run.task["name"]])
    model, tokenizer = load_model(
        places[run.model["name"]],
        head=run.model["head"],
        labels=task.labels,
        dtype=run.model["dtype"],
        seed=run.seed,
        kind=task.kind,
    )
    model.to(best_device())
    total = sum(parameter.numel() for parameter in model.parameters())
    torch.manual_seed(run.seed)
    delta = dt.attach(model, from_json(run.spec))
    settings = TrainSettings.from_json(run.settings)
    loaded = time.monotonic()
    resting = resident_bytes(torch.cuda.is_available())
    trained = train(model, tokenizer, task, delta, settings, on_event=on_event)
    if trained.best_dev is None or trained.best_step is None:
        raise StudyError("training ended without a dev metric; set `eval_steps`")
    test = _test(run, model, tokenizer, task, settings)
    return Result(
        dev=trained.best_dev,
        test=test,
        best_step=trained.best_step,
        steps=trained.steps,
        epochs=trained.epochs,
        stopped=trained.stopped,
        curve=[list(point) for point in trained.curve],
        losses=list(trained.losses),
        trainable=delta.count(),
        trainable_without_head=delta.count(head=False),
        total=total,
        saved_bytes=_saved(run, delta, folder, keep),
        peak_memory_bytes=trained.peak_memory_bytes,
        start_memory_bytes=resting,
        train_seconds=trained.seconds,
        eval_seconds=trained.eval_seconds,
        load_seconds=loaded - begun,
    )


def _task(run: Run, place: str) -> Task:
    task = load_task(place)
    if digest_task(task) != run.task["digest"]:
        raise StudyError(
            f"task `{run.task['name']}` is not the one that the study was planned with; "
            "its files changed: run the study again to plan it anew"
        )
    sizes = {name: run.task[name] for name in ("train", "dev", "test") if run.task[name]}
    task = task.limited(**sizes)
    return task if run.kind == "final" else dataclasses.replace(task, test=[])


def _test(
    run: Run, model: Any, tokenizer: Any, task: Task, settings: TrainSettings
) -> float | None:
    if run.kind == "selection":
        return None
    found = evaluate(
        model,
        tokenizer,
        task,
        "test",
        batch_size=settings.per_device_eval_batch_size,
        precision=settings.precision,
        max_length=settings.max_length,
    )
    return found.value


def _saved(run: Run, delta: Any, folder: Path, keep: bool) -> int | None:
    if run.kind == "selection":
        return None
    path = folder / "deltas" / run.digest()
    shutil.rmtree(path, ignore_errors=True)
    path.parent.mkdir(exist_ok=True)
    try:
        delta.save(path)
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    finally:
        if not keep:
            shutil.rmtree(path, ignore_errors=True)


def _teller(run: Run, tell: Tell, every: float = 0.5) -> Callable[[Event], None]:
    said, dev = 0.0, None
    digest = run.digest()

    def on_event(event: Event) -> None:
        nonlocal said, dev
        if isinstance(event, Evaluated):
            dev = event.value
        now = time.monotonic()
        if isinstance(event, Step) and now - said > every:
            said = now
            share = event.step / event.steps
            tell({"event": "progress", "digest": digest, "share": share, "dev": dev})

    return on_event
