"""What a training run reports, while it runs and at its end. Imports no torch."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from deltune.training.settings import Arithmetic

Stopped = Literal["done", "early"]


@dataclass(frozen=True, slots=True)
class Started:
    """The run is set up; the first step follows."""

    steps: int
    """Steps of the whole run."""
    steps_per_epoch: int
    examples: int
    """Training examples."""
    parameters: int
    """Trainable scalars."""
    resumed_at: int
    """Steps already done by the checkpoint that the run goes on from; 0 for a new run."""
    precision: Arithmetic
    """What the setting of this name came to on this device."""


@dataclass(frozen=True, slots=True)
class Noted:
    """Something that the user should know and that does not stop the run."""

    text: str


@dataclass(frozen=True, slots=True)
class Step:
    """One update of the parameters."""

    step: int
    steps: int
    loss: float
    """Mean over the examples of the step, before the update."""
    lr: float
    seconds: float
    """Time in training steps so far, without evaluations and checkpoints."""


@dataclass(frozen=True, slots=True)
class Evaluated:
    """One evaluation."""

    step: int
    split: str
    metric: str
    value: float
    best: bool
    """Whether this is the best value so far."""


@dataclass(frozen=True, slots=True)
class Checkpointed:
    """A checkpoint is complete on disk."""

    step: int
    path: Path


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a run came to."""

    best_dev: float | None
    """Best dev value; None without evaluation."""
    best_step: int | None
    steps: int
    """Steps done; fewer than planned after early stopping."""
    epochs: float
    curve: tuple[tuple[int, float, float], ...]
    """(step, seconds in training steps, dev value) of each evaluation."""
    losses: tuple[float, ...]
    """Loss of each step."""
    seconds: float
    """Time in training steps, over all restarts; evaluations and checkpoints not counted."""
    eval_seconds: float
    """Time in evaluations."""
    peak_memory_bytes: int | None
    """Highest memory of the run, see `deltune.training.memory`; None if it cannot be measured."""
    precision: Arithmetic
    """What the setting of this name came to on this device."""
    stopped: Stopped
    """"done" at the planned end, "early" by early stopping."""


@dataclass(frozen=True, slots=True)
class Finished:
    """The run is over; the model holds its result."""

    result: TrainResult


@dataclass(frozen=True, slots=True)
class EvalResult:
    """One evaluation of a model on a split."""

    metric: str
    value: float
    predictions: tuple[str, ...]
    """In the order of the split's records."""
    seconds: float


Event = Started | Noted | Step | Evaluated | Checkpointed | Finished
OnEvent = Callable[[Event], None]
