"""Settings of a training run, in the words of `TrainingArguments`. Imports no torch."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from deltune.errors import TrainError, closest, listing

Precision = Literal["auto", "fp32", "bf16"]
Arithmetic = Literal["fp32", "bf16"]
Optimizer = Literal["adamw", "adafactor"]
Schedule = Literal["linear", "cosine", "constant"]

_ADAMW_BETAS = (0.9, 0.999)
_ADAMW_EPS = 1e-8


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """How to train: everything that decides the outcome of a run beside model, delta and task.

    One *step* is one update of the parameters. It sees `per_device_train_batch_size *
    gradient_accumulation_steps` examples of each process; every example of it weighs the same.

    Example:
        >>> TrainSettings(learning_rate=5e-4, max_steps=200, warmup_steps=0.06).warmup(200)
        12

    Raises:
        TrainError: a value that cannot be used.
    """

    learning_rate: float = 1e-3
    """Learning rate at the top of the schedule, per step."""
    num_train_epochs: float = 3.0
    """Passes over the training data; not used when max_steps is given."""
    max_steps: int | None = None
    """Number of steps; overrides num_train_epochs."""
    per_device_train_batch_size: int = 32
    """Examples in one forward pass of training."""
    per_device_eval_batch_size: int = 64
    """Examples in one forward pass of evaluation."""
    gradient_accumulation_steps: int = 1
    """Forward passes in one step."""
    max_length: int = 128
    """Longest input in tokens; what is longer is cut."""
    group_by_length: bool = True
    """Build batches of examples of similar length, which saves padding."""
    optimizer: Optimizer = "adamw"
    """Update rule."""
    betas: tuple[float, float] = _ADAMW_BETAS
    """Decay rates of AdamW's averages of the gradient and of its square."""
    eps: float = _ADAMW_EPS
    """Added to the denominator of AdamW's update."""
    weight_decay: float = 0.0
    """Decoupled weight decay; tensors of one dimension (biases, norms) are never decayed."""
    lr_scheduler_type: Schedule = "linear"
    """Course of the learning rate after the warm-up: linear or cosine down to 0, or constant."""
    warmup_steps: float = 0
    """Steps in which the learning rate rises from 0; below 1 it is a fraction of all steps."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this joint 2-norm; 0 turns clipping off."""
    precision: Precision = "fp32"
    """Arithmetic of the forward pass: fp32 leaves the model as it is, bf16 is bfloat16 autocast,
    auto is bf16 where the device has it built in (elsewhere it is many times slower) and fp32 if
    not."""
    backbone_dropout: bool = True
    """Whether the backbone's dropout acts in training. Without it a frozen backbone gives what it
    gives in use, and a step is cheaper; what a delta drops of its own it drops either way."""
    cache_frozen: bool = False
    """Run the blocks below everything that is trained once for each example, without their dropout,
    and keep the outputs: less work in every further epoch and evaluation, for 4 bytes a number in
    fp32. For class heads and multiple choice with them; whatever else is run whole."""
    lean: bool = False
    """Keep less for the backward pass, with the same gradients: see `deltune.lean`. Refused for
    models whose feed-forward parts are not known."""
    eval_steps: int | Literal["epoch", "no"] = "epoch"
    """When to evaluate on dev: every so many steps, after each epoch, or not at all. The last
    step is always evaluated unless this is "no"."""
    eval_on_start: bool = False
    """Also evaluate before the first step."""
    early_stopping_patience: int | None = None
    """Stop after so many evaluations in a row without a new best dev value."""
    load_best_model_at_end: bool = True
    """End with the tensors of the best evaluation rather than with those of the last step."""
    save_steps: int | None = None
    """Write a checkpoint every so many steps, beside those written at each evaluation."""
    allow_unused: bool = False
    """Train even if some of the trainable tensors receive no gradient."""
    seed: int = 0
    """Decides the order of the data and all random numbers of training."""

    def __post_init__(self) -> None:
        _check_numbers(self)
        _check_choices(self)
        _check_together(self)

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON values; `from_json` undoes it. Options that came later are left out at
        their defaults: what was written before them keeps its digest."""
        values = asdict(self) | {"betas": list(self.betas)}
        return {n: v for n, v in values.items() if n not in _LATER or v != _LATER[n]}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "TrainSettings":
        """Settings from a mapping such as a table of a TOML file; fields left out keep defaults.

        Raises:
            TrainError: an unknown field, or a value that cannot be used.
        """
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                raise TrainError(
                    f"unknown training setting `{name}`{closest(name, known)}; "
                    f"the settings are {listing(known)}"
                )
        return cls(**values)

    def warmup(self, steps: int) -> int:
        """Warm-up steps in a run of `steps` steps.

        Raises:
            TrainError: the warm-up would outlast the run.
        """
        if self.warmup_steps < 1:
            return math.ceil(self.warmup_steps * steps)
        if self.warmup_steps > steps:
            raise TrainError(
                f"warmup_steps is {self.warmup_steps:g} and the run has {steps} steps, so the "
                f"learning rate would never reach {self.learning_rate:g}; use fewer warm-up "
                "steps, a fraction such as warmup_steps=0.06, or a longer run"
            )
        return int(self.warmup_steps)

    def total_steps(self, steps_per_epoch: int) -> int:
        """Steps of the whole run."""
        return self.max_steps or max(1, math.ceil(self.num_train_epochs * steps_per_epoch))


_LATER = {"cache_frozen": False, "backbone_dropout": True, "lean": False}


def _refuse(name: str, value: object, expected: str, remedy: str = "") -> None:
    remedy = remedy or f"set `{name}` to such a value"
    raise TrainError(f"{name} is {value!r}; expected {expected}; {remedy}")


def _real(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_numbers(settings: TrainSettings) -> None:
    s = settings
    for name in ("learning_rate", "num_train_epochs", "eps"):
        value = getattr(s, name)
        if not _real(value) or value <= 0:
            _refuse(name, value, "a finite number above 0")
    for name in ("weight_decay", "max_grad_norm", "warmup_steps"):
        value = getattr(s, name)
        if not _real(value) or value < 0:
            _refuse(name, value, "a finite number, 0 or above")
    whole = ["per_device_train_batch_size", "per_device_eval_batch_size"]
    whole += ["gradient_accumulation_steps", "max_length"]
    optional = ["max_steps", "early_stopping_patience", "save_steps"]
    for name in whole + [name for name in optional if getattr(s, name) is not None]:
        value = getattr(s, name)
        if not _whole(value) or value < 1:
            _refuse(name, value, "a whole number, 1 or above")
    if not _whole(s.seed) or not 0 <= s.seed < 2**63:
        _refuse("seed", s.seed, "a whole number from 0 to 2**63 - 1")
    if s.warmup_steps > 1 and s.warmup_steps != int(s.warmup_steps):
        _refuse("warmup_steps", s.warmup_steps, "a whole number, or a fraction below 1")


def _check_choices(settings: TrainSettings) -> None:
    s = settings
    choices = {"precision": Precision, "optimizer": Optimizer, "lr_scheduler_type": Schedule}
    for name, kind in choices.items():
        value, known = getattr(s, name), get_args(kind)
        if value not in known:
            _refuse(name, value, f"one of {listing(known)}{closest(str(value), known)}")
    flags = ("group_by_length", "cache_frozen", "eval_on_start", "load_best_model_at_end")
    for name in (*flags, "allow_unused", "backbone_dropout", "lean"):
        if not isinstance(getattr(s, name), bool):
            _refuse(name, getattr(s, name), "true or false")
    if s.eval_steps not in ("epoch", "no") and not (_whole(s.eval_steps) and s.eval_steps >= 1):
        _refuse("eval_steps", s.eval_steps, 'a whole number of steps, "epoch" or "no"')
    betas = s.betas
    if not isinstance(betas, tuple | list) or len(betas) != 2 or not all(map(_real, betas)):
        _refuse("betas", betas, "two numbers, 0 or above and below 1")
    if not all(0 <= beta < 1 for beta in betas):
        _refuse("betas", betas, "two numbers, 0 or above and below 1")
    object.__setattr__(s, "betas", tuple(betas))


def _check_together(settings: TrainSettings) -> None:
    s = settings
    if s.optimizer != "adamw" and (s.betas, s.eps) != (_ADAMW_BETAS, _ADAMW_EPS):
        raise TrainError(
            f"betas={s.betas!r}, eps={s.eps!r} with optimizer={s.optimizer!r}; these two belong "
            "to adamw alone; leave them out or use optimizer='adamw'"
        )
    for name in ("eval_on_start", "early_stopping_patience"):
        if s.eval_steps == "no" and getattr(s, name):
            expected = 'no such setting beside eval_steps="no"'
            _refuse(name, getattr(s, name), expected, "leave one of the two out")
