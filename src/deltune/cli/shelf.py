"""The folder that `deltune train` writes, and what later commands read back from it."""

import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from deltune.errors import DataError, StoreError
from deltune.training.settings import TrainSettings


@dataclass(frozen=True, slots=True)
class Shelf:
    """What a delta was trained on: enough to load the same model and pose the same questions."""

    model: str | None = None
    head: str = "auto"
    task: str | None = None
    kind: str | None = None
    metric: str | None = None
    labels: tuple[str, ...] = ()
    max_length: int = 128

    @classmethod
    def of(cls, model: str, head: str, task: Any, place: str, settings: TrainSettings) -> Self:
        """That of a training."""
        labels = tuple(task.labels or ())
        return cls(model, head, place, task.kind, task.metric, labels, settings.max_length)

    def replaced(self, model: str | None, task: str | None, head: str | None) -> "Shelf":
        """The same with what the user gave in its place."""
        given = {"model": model, "task": task, "head": head}
        changed = dataclasses.replace(self, **{k: v for k, v in given.items() if v is not None})
        if task is None:
            return changed
        from deltune.tasks.records import load_task

        found = load_task(task)
        labels = tuple(found.labels or ())
        return dataclasses.replace(changed, kind=found.kind, metric=found.metric, labels=labels)

    def need(self, name: str) -> str:
        """A field that must be known by now."""
        value = getattr(self, name)
        if value is None:
            raise DataError(
                f"the {name} is not known: no result.json of `deltune train` lies beside the "
                f"delta; give --{name}"
            )
        return value

    def empty_task(self) -> Any:
        """A task without records, of the same kind and labels."""
        from deltune.tasks.task import Task

        kind = self.need("kind") if self.kind else self.need("task")
        return Task("predictions", kind, self.need("metric"), self.labels or None, [], [], [])


def free_folder(path: Path, overwrite: bool, resume: bool) -> None:
    """Sees to it that a folder may be written.

    Raises:
        StoreError: it exists and neither `overwrite` nor `resume` was asked for, or both were.
    """
    if overwrite and resume:
        raise StoreError("--overwrite and --resume are opposites; give one of them")
    if not path.exists() or resume:
        return
    if not overwrite:
        raise StoreError(
            f"`{path}` exists already; choose another --out, replace it with --overwrite, or, for "
            "a training that was stopped, go on with --resume"
        )
    if not path.is_dir():
        raise StoreError(f"`{path}` is a file; choose another --out")
    ours = ("result.json", "delta", "checkpoints", "config.json")
    if any(path.iterdir()) and not any((path / name).exists() for name in ours):
        raise StoreError(
            f"`{path}` is not a folder that deltune wrote, so --overwrite does not delete it; "
            "choose another --out"
        )
    shutil.rmtree(path)


def delta_folder(path: Path) -> Path:
    """The delta's own folder: `path`, or `path/delta` for the folder of a training."""
    inner = path / "delta"
    return inner if (inner / "delta.json").exists() else path


def write_result(
    out: Path,
    spec: str,
    shelf: Shelf,
    *,
    settings: TrainSettings,
    trainable: int,
    result: dict[str, Any],
    test: float | None,
) -> dict[str, Any]:
    """Writes `result.json`; its data."""
    from deltune.study.records import write_atomic

    data = {
        "format": 1,
        "spec": spec,
        "trainable": trainable,
        "trained_on": dataclasses.asdict(shelf),
        "settings": settings.to_json(),
        "result": result,
        "test": test,
    }
    write_atomic(out / "result.json", json.dumps(data, indent=1) + "\n")
    return data


def write_origin(out: Path, spec: str, shelf: Shelf, origin: dict[str, Any]) -> None:
    """Writes the `result.json` of a delta that was not trained here, so that later commands know
    the model and the task as of one that was."""
    from deltune.study.records import write_atomic

    data = {"format": 1, "spec": spec, "trained_on": dataclasses.asdict(shelf), **origin}
    write_atomic(out / "result.json", json.dumps(data, indent=1) + "\n")


def read_result(folder: Path) -> Shelf:
    """What `result.json` says of the training; nothing where there is none.

    Raises:
        StoreError: there is no such folder, or the file is damaged.
    """
    if not folder.is_dir():
        raise StoreError(f"there is no delta at `{folder}`; give the folder of a saved delta")
    for path in (folder / "result.json", folder.parent / "result.json"):
        if path.exists() and delta_folder(path.parent) == delta_folder(folder):
            return _shelf(path)
    return Shelf()


def _shelf(path: Path) -> Shelf:
    from deltune.study.codec import decode

    try:
        data = json.loads(path.read_text(encoding="utf-8"))["trained_on"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"`{path}` is damaged ({type(error).__name__}: {error}); remove it and give --model "
            "and --task"
        ) from None
    return decode(Shelf, data, f"{path}: trained_on")
