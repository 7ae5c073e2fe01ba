"""From a study file to a plan: tasks read, specs and settings checked, before anything runs."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deltune.errors import DeltuneError, StudyError, TrainError
from deltune.study.machine import best_device
from deltune.study.plan import MethodInfo, Plan, TaskInfo
from deltune.study.settings import MethodEntry, Study, TaskEntry, place_of, read_study
from deltune.tasks.records import Task, load_task
from deltune.training.precision import resolve as resolve_precision
from deltune.training.settings import TrainSettings

OWN = ("learning_rate", "seed")


def plan_study(path: str | Path) -> Plan:
    """The plan of a study file.

    Args:
        path: a `study.toml`.

    Returns:
        The plan: every run of the study follows from it.

    Raises:
        StudyError: the file, a spec, a setting or a task of it cannot be used.
    """
    path = Path(path)
    study = read_study(path)
    places = {
        entry.name: place_of(entry.name, path.parent) for entry in (*study.models, *study.tasks)
    }
    tasks = tuple(_task(entry, places[entry.name], study) for entry in study.tasks)
    methods = tuple(_method(entry, study, path.name) for entry in study.methods)
    largest = max(task.train for task in tasks), max(task.dev for task in tasks)
    return Plan(
        name=study.study.name,
        about=study.study.about,
        seeds=study.study.seeds,
        keep_deltas=study.study.keep_deltas,
        models=study.models,
        tasks=tasks,
        methods=methods,
        selection={
            "train": study.selection.train or largest[0],
            "dev": study.selection.dev or largest[1],
            "seed": study.selection.seed,
        },
        places=places,
    )


def digest_task(task: Task) -> str:
    """SHA-256 over kind, metric, labels and every record of a task, in order."""
    sha = hashlib.sha256()
    head = [task.kind, task.metric, list(task.labels) if task.labels else None]
    sha.update(json.dumps(head).encode())
    for split in ("train", "dev", "test"):
        sha.update(split.encode())
        for record in getattr(task, split):
            sha.update(json.dumps(dataclasses.astuple(record), ensure_ascii=False).encode())
    return sha.hexdigest()


def _task(entry: TaskEntry, place: str, study: Study) -> TaskInfo:
    task = load_task(place)
    sizes = {}
    for split in ("train", "dev", "test"):
        there, wanted = len(getattr(task, split)), getattr(study.budget, split)
        if not there:
            raise StudyError(f"task `{entry.name}` has no {split} records; a study needs all three")
        sizes[split] = min(there, wanted or there)
    labels = tuple(task.labels) if task.labels else None
    return TaskInfo(
        entry.name, task.name, task.kind, task.metric, digest_task(task), labels, **sizes
    )


def _method(entry: MethodEntry, study: Study, file: str) -> MethodInfo:
    from deltune.spec import parse

    try:
        spec = parse(entry.spec)
    except DeltuneError as error:
        raise StudyError(f"{file}: method `{entry.name}`: {error}") from None
    place = f"{file}: method `{entry.name}`: train settings"
    chosen = {**study.train, **entry.train}
    return MethodInfo(
        name=entry.name,
        text=str(spec),
        spec=json.loads(json.dumps(spec.to_json())),
        learning_rate=entry.learning_rate,
        settings=_settings(chosen, place),
        selection_settings=_settings({**chosen, **study.selection.settings}, place),
        family=spec.family,
        note=entry.note,
    )


def _settings(table: Mapping[str, Any], place: str) -> dict[str, Any]:
    for name in OWN:
        if name in table:
            where = "in the grid of each method" if name == "learning_rate" else "in [study] seeds"
            raise StudyError(f"{place}: `{name}` does not belong here; it stands {where}")
    try:
        settings = TrainSettings.from_json(table)
    except TrainError as error:
        raise StudyError(f"{place}: {error}") from None
    if settings.eval_steps == "no":
        raise StudyError(f'{place}: eval_steps is "no"; a study needs the dev metric of every run')
    # A run's identity says what it computed in, so that another machine's run is another run.
    plain = {"precision": resolve_precision(settings.precision, best_device())}
    return {n: v for n, v in (settings.to_json() | plain).items() if n not in OWN}
