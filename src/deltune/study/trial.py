"""A run that trains: load, attach, train stage by stage, test, measure."""

import dataclasses
import shutil
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

import deltune as dt
from deltune.errors import StudyError
from deltune.spec import from_json
from deltune.study.machine import best_device, resident_bytes
from deltune.study.plan import Run
from deltune.study.records import Result
from deltune.study.resolve import digest_task
from deltune.tasks.models import load_model
from deltune.tasks.objectives import objective_for
from deltune.tasks.records import Task, load_task
from deltune.training.events import Event, TrainResult
from deltune.training.loop import evaluate, train
from deltune.training.settings import TrainSettings

OWN = ("train_metric", "final")
"""Settings of a run that are not of its training."""


def trial(
    run: Run, places: dict[str, str], folder: Path, keep: bool, on_event: Callable[[Event], None]
) -> Result:
    """Trains and tests; what it measured.

    Args:
        run: a selection or final run.
        places: where its model and task lie.
        folder: of the study; a kept delta goes to `deltas/`.
        keep: whether the delta is kept.
        on_event: called with the events of training.
    """
    begun = time.monotonic()
    task = task_of(run, run.task, places, run.seed)
    model, tokenizer = model_of(run, places, task)
    total = sum(parameter.numel() for parameter in model.parameters())
    stages = run.stages or [{"spec": run.spec, "settings": run.settings}]
    settings = [settings_of({**run.settings, **stage["settings"]}) for stage in stages]
    objective = objective_for(
        task, model, tokenizer, max_length=settings[0].max_length,
        template=run.task.get("template"),
    )  # fmt: skip
    torch.manual_seed(run.seed)
    deltas, trained = [], []
    for number, stage in enumerate(stages):
        name = f"stage {number + 1}" if run.stages else "delta"
        deltas.append(dt.attach(model, from_json(stage["spec"]), name, head=number == 0))
        if number == 0:
            loaded, resting = time.monotonic(), resident_bytes(torch.cuda.is_available())
        one = train(
            model, tokenizer, task, deltas[-1], settings[number], objective=objective,
            on_event=on_event,
        )  # fmt: skip
        if one.best_dev is None or one.best_step is None:
            raise StudyError("training ended without a dev metric; set `eval_steps`")
        trained.append(one)

    def score(split: str) -> float:
        last = settings[-1]
        return evaluate(
            model, tokenizer, task, split, batch_size=last.per_device_eval_batch_size,
            precision=last.precision, objective=objective,
        ).value  # fmt: skip

    final = run.kind == "final"
    return Result(
        **_joined(trained),
        test=score("test") if final else None,
        train=score("train") if final and run.settings.get("train_metric") else None,
        trainable=sum(delta.count() for delta in deltas),
        trainable_without_head=sum(delta.count(head=False) for delta in deltas),
        total=total,
        saved_bytes=_saved(run, deltas, folder, keep) if final else None,
        start_memory_bytes=resting,
        load_seconds=loaded - begun,
    )


def task_of(run: Run, about: dict[str, Any], places: dict[str, str], seed: int) -> Task:
    """The task that a run's description means, cut to its sizes.

    Raises:
        StudyError: its records are not those that the study was planned with.
    """
    task = load_task(places[about["name"]])
    if digest_task(task) != about["digest"]:
        raise StudyError(
            f"task `{about['name']}` is not the one that the study was planned with; "
            "its files changed: run the study again to plan it anew"
        )
    splits = ("train", "dev", "test")
    if about.get("shots"):
        task, splits = task.few_shot(about["shots"], seed), ("test",)
    task = task.limited(**{name: about[name] for name in splits if about[name]})
    return dataclasses.replace(task, test=[]) if run.kind == "selection" else task


def model_of(run: Run, places: dict[str, str], task: Task | None) -> tuple[Any, Any]:
    """The model of a run with its tokenizer, on the best device; without a task, a class head of
    two labels."""
    model, tokenizer = load_model(
        places[run.model["name"]],
        head=run.model["head"],
        labels=task.labels if task else ("0", "1"),
        dtype=run.model["dtype"],
        seed=run.seed,
        kind=task.kind if task else None,
        layers=run.model.get("layers"),
        pretrained=run.model.get("pretrained", True),
        attention=run.model.get("attention"),
    )
    return model.to(best_device()), tokenizer


def stage_folder(folder: Path, run: Run, number: int) -> Path:
    """Where the delta of a stage is kept; that of a run of one stage is the folder itself."""
    return folder / str(number) if run.stages else folder


def settings_of(table: dict[str, Any]) -> TrainSettings:
    """The settings of training out of those of a run."""
    return TrainSettings.from_json({n: value for n, value in table.items() if n not in OWN})


def _joined(stages: list[TrainResult]) -> dict[str, Any]:
    """The results of stages as one: their curves in a row, and the best of the last stage."""
    last = stages[-1]
    steps = [0, *accumulate(stage.steps for stage in stages)]
    seconds = [0.0, *accumulate(stage.seconds for stage in stages)]
    peaks = [stage.peak_memory_bytes for stage in stages]
    return {
        "dev": last.best_dev,
        "best_step": steps[-2] + (last.best_step or 0),
        "steps": steps[-1],
        "epochs": sum(stage.epochs for stage in stages),
        "stopped": last.stopped,
        "curve": [
            [start + step, before + spent, dev]
            for stage, start, before in zip(stages, steps, seconds, strict=False)
            for step, spent, dev in stage.curve
        ],
        "losses": [loss for stage in stages for loss in stage.losses],
        "peak_memory_bytes": max((peak for peak in peaks if peak is not None), default=None),
        "train_seconds": seconds[-1],
        "eval_seconds": sum(stage.eval_seconds for stage in stages),
    }


def _saved(run: Run, deltas: list[dt.Delta], folder: Path, keep: bool) -> int:
    path = folder / "deltas" / run.digest()
    shutil.rmtree(path, ignore_errors=True)
    path.parent.mkdir(exist_ok=True)
    try:
        for number, delta in enumerate(deltas):
            delta.save(stage_folder(path, run, number))
        return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    finally:
        if not keep:
            shutil.rmtree(path, ignore_errors=True)
