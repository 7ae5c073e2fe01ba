"""How far a run has come, and its way to and from a folder."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from deltune.errors import TrainError
from deltune.tasks.task import Task
from deltune.training import checkpoint, optim
from deltune.training.events import Stopped
from deltune.training.settings import TrainSettings
from deltune.training.trainables import Trainables


@dataclass(slots=True)
class Progress:
    """Everything that a run knows beside its tensors."""

    step: int = 0
    seconds: float = 0.0
    eval_seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    curve: list[tuple[int, float, float]] = field(default_factory=list)
    best_dev: float | None = None
    best_step: int | None = None
    waited: int = 0
    """Evaluations since the best."""
    stopped: Stopped | None = None
    peak_memory_bytes: int | None = None
    best: dict[str, Tensor] | None = None
    """The trainable tensors at the best evaluation."""

    def to_json(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in self.__slots__ if name != "best"}
        return json.loads(json.dumps(values))

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Progress":
        progress = cls(**values)
        progress.curve = [(step, seconds, value) for step, seconds, value in values["curve"]]
        return progress


class Saver:
    """Writes a run's checkpoints to a folder and finds the run again; without folder, neither."""

    def __init__(self, folder: str | Path | None, identity: dict[str, Any]) -> None:
        self._folder = None if folder is None else Path(folder)
        self._identity = json.loads(json.dumps(identity))

    def resume(self, trainables: Trainables, optimizer: Optimizer) -> Progress:
        """The run in the folder, its tensors loaded; a new one if there is none.

        Raises:
            TrainError: the folder holds another run, or a damaged one.
        """
        path = None if self._folder is None else checkpoint.newest(self._folder)
        if path is None:
            return Progress()
        state = checkpoint.read_state(path)
        _check_same(path, state.get("identity", {}), self._identity)
        progress = Progress.from_json(state["progress"])
        trainables.load(checkpoint.read_tensors(path, "model"))
        optim.load_state_tensors(optimizer, checkpoint.read_tensors(path, "optimizer"))
        if progress.best_step is not None:
            progress.best = checkpoint.read_tensors(path, "best")
        return progress

    def save(self, progress: Progress, trainables: Trainables, optimizer: Optimizer) -> Path | None:
        """Writes a checkpoint; None without folder."""
        if self._folder is None:
            return None
        files = {"model": trainables.copy(), "optimizer": optim.state_tensors(optimizer)}
        if progress.best is not None:
            files["best"] = progress.best
        state = {"identity": self._identity, "progress": progress.to_json()}
        return checkpoint.write(self._folder, progress.step, files, state)


def identity(
    task: Task,
    lengths: Sequence[int],
    settings: TrainSettings,
    trainables: Trainables,
    *,
    delta: Any,
    run: dict[str, Any],
) -> dict[str, Any]:
    """What must be the same when a run goes on."""
    digest = hashlib.blake2b(digest_size=16)
    for record in [*task.train, None, *task.dev]:
        digest.update(repr(record).encode())
    digest.update(repr(list(lengths)).encode())
    decisive = settings.to_json()
    del decisive["save_steps"]  # where a run was saved changes nothing in it
    return {
        "settings": decisive,
        "task": {"name": task.name, "metric": task.metric, "data digest": digest.hexdigest()},
        "delta": {"spec": str(getattr(delta, "spec", None))},
        "tensors": trainables.shapes(),
        "run": run,
    }


def _check_same(path: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    lines = []
    for part in here:
        old, new = there.get(part, {}), here[part]
        for name in [*new, *(name for name in old if name not in new)]:
            if old.get(name, "none") != new.get(name, "none"):
                lines.append(
                    f"  {part}, `{name}`:\n    checkpoint: {old.get(name, 'none')}\n"
                    f"    this run:   {new.get(name, 'none')}"
                )
    if not lines:
        return
    more = [f"  and {len(lines) - 8} more differences"] if len(lines) > 8 else []
    raise TrainError(
        f"`{path}` belongs to another run; they differ in\n"
        + "\n".join(lines[:8] + more)
        + "\nuse another folder, make the two equal, or delete the checkpoint to start again"
    )
