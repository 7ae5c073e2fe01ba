"""One run of training: its data, optimiser, schedule and records, step by step.

A run is a generator. It yields what is to be forwarded (`Part`) and is sent the loss of it, whose
gradient is there by then; and it yields that its optimiser is to step (`Due`). It does all else by
itself; so one loop serves a run alone and many runs whose parts share a forward.
"""

import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from deltune.errors import TrainError, listing
from deltune.tasks.task import Task
from deltune.training import optim
from deltune.training.batches import Order
from deltune.training.course import Course
from deltune.training.evaluation import (
    Objective,
    in_mode,
    predict,
    split_records,
    task_score,
    to_device,
)
from deltune.training.events import (
    Checkpointed,
    Evaluated,
    Event,
    Finished,
    Noted,
    OnEvent,
    Started,
    Step,
    TrainResult,
)
from deltune.training.generators import seed_step
from deltune.training.memory import PeakMemory
from deltune.training.precision import autocast, native_bf16, resolve
from deltune.training.progress import Saver, identity
from deltune.training.schedule import factor
from deltune.training.settings import TrainSettings
from deltune.training.trainables import Trainables
from deltune.training.trunk import Trunk, find_trunk
from deltune.training.world import World

_NO_DEV = "give it some, or train without evaluation: eval_steps='no'"


class Part(NamedTuple):
    """Examples of one forward pass."""

    examples: list[Any]
    share: float
    """Of their mean loss in that of the step."""


class Due(NamedTuple):
    """A step of the optimiser, whose gradient is there."""

    loss: Tensor
    """Of the step."""


class Outcome(NamedTuple):
    """Of a step of the optimiser, which was not taken where one of the two is not finite."""

    loss: float
    norm: float
    """Of the gradient, before clipping."""

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.norm)


Steps = Generator[Part | Due, Any, TrainResult]
"""A run: for a part it is sent its loss, for what is due its outcome."""


class Run:
    """A delta, or a model, in training.

    Args:
        by_itself: makes a context in which the model acts with what this run trains and nothing of
            other runs.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        trainables: Trainables,
        settings: TrainSettings,
        objective: Objective,
        world: World,
        course: Course,
        by_itself: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.by_itself = by_itself
        self.model, self.task, self.settings, self.course = model, task, settings, course
        self.trainables, self.objective = trainables, objective
        self.world, self.device = world, trainables.parameters[0].device
        self.precision = resolve(settings.precision, self.device)
        cut = getattr(objective, "truncated", 0)
        self.examples = objective.encode(split_records(task, "train"))
        self.evaluates = settings.eval_steps != "no"
        self.dev = split_records(task, "dev", _NO_DEV) if self.evaluates else []
        self.dev_examples = objective.encode(self.dev) if self.evaluates else []
        self.cut = getattr(objective, "truncated", 0) - cut
        self.lengths = [example.length for example in self.examples]
        self.order = Order(self.lengths, settings, self.world.size)
        self.steps = settings.total_steps(self.order.steps_per_epoch)
        self.warmup = settings.warmup(self.steps)
        self.optimizer = optim.build(trainables.parameters, settings, course)
        self.memory = PeakMemory(self.device)
        self.checked = settings.allow_unused
        self.trunk: Trunk | None = None
        self.sought = not settings.cache_frozen

    def open(
        self, folder: str | Path | None, delta: Any, on_event: OnEvent | None,
        about: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:  # fmt: skip
        self.on_event = on_event
        known = identity(
            self.task,
            self.lengths,
            self.settings,
            self.trainables,
            delta=delta,
            run={"processes": self.world.size, "precision": self.precision, **about},
        )
        self.saver = Saver(folder, known)
        self.world.same_start(list(self.trainables.live().values()))
        self.progress = self.saver.resume(self.trainables, self.optimizer)
        self.world.wait()  # the first process must not sweep what another still reads

    def alone(self) -> TrainResult:
        """The whole run, with the model for itself."""
        steps, value = self.all(), None
        while True:
            try:
                asked = steps.send(value)
            except StopIteration as end:
                return end.value
            value = self.update(asked.loss) if isinstance(asked, Due) else self.forth_back(asked)

    def forth_back(self, part: Part) -> Tensor:
        """The share of a part in the loss, whose gradient is added."""
        loss = self.loss(part)
        loss.backward()
        return loss.detach()

    def loss(self, part: Part) -> Tensor:
        """The share of a part in the loss of its step."""
        inputs = self.collate(part.examples)
        with autocast(self.device, self.precision):
            self.seek_trunk(inputs)
            with self.feeding(part.examples):
                loss = self.objective.loss(self.model, inputs)
        return self.shared(loss, part)

    def shared(self, loss: Tensor, part: Part) -> Tensor:
        """The same of the mean loss of the part's examples."""
        if not loss.requires_grad:
            raise self.unreached(self.trainables.names)
        return loss * part.share

    def update(self, loss: Tensor) -> Outcome:
        """A step of the optimiser."""
        parameters = self.trainables.parameters
        norm = optim.gradient_norm(parameters)
        # The only point of a step that waits for the device.
        outcome = Outcome(*torch.stack([loss, norm.to(loss.dtype)]).tolist())
        if outcome.finite:
            optim.clip(parameters, self.settings.max_grad_norm, norm, outcome.norm)
            self.optimizer.step()
        return outcome

    def all(self) -> Steps:
        """The whole run: yields parts, is sent their shares of the loss once their gradients are
        added; yields what is due, is sent its outcome."""
        s, p = self.settings, self.progress
        sizes = (self.order.steps_per_epoch, len(self.examples), self.trainables.count)
        self.report(Started(self.steps, *sizes, resumed_at=p.step, precision=self.precision))
        self.note()
        if p.step == 0 and not self.course.idle:
            seed_step(s.seed, 0, 0, self.device)
            with self.by_itself():
                self.course.prepare(self.losses)
            self.world.same_start(list(self.trainables.live().values()))
            self.trainables.clear_gradients()
        if s.eval_on_start and p.step == 0 and not p.curve:
            self.evaluate()
        while p.stopped is None:
            yield from self.step()
            due = self.evaluation_due()
            if due:
                self.evaluate()
            if p.step == self.steps:
                p.stopped = "done"
            if due or p.stopped or (s.save_steps and p.step % s.save_steps == 0):
                self.save()
        if s.load_best_model_at_end and p.best is not None:
            self.trainables.load(p.best)
        result = self.result()
        self.report(Finished(result))
        return result

    def note(self) -> None:
        if self.cut:
            count = len(self.examples) + len(self.dev_examples)
            self.report(Noted(f"{self.cut} of {count} inputs are longer than max_length and cut"))
        if self.precision == "bf16" and not native_bf16(self.device):
            slow = f"this {self.device.type} only emulates bfloat16, many times slower than fp32"
            self.report(Noted(f"{slow}; use precision='auto'"))

    def step(self) -> Generator[Part | Due, Any]:
        s, p = self.settings, self.progress
        started = time.perf_counter()
        seed_step(s.seed, self.world.rank, p.step, self.device)
        rate = s.learning_rate * factor(s.lr_scheduler_type, p.step, self.steps, self.warmup)
        optim.set_rate(self.optimizer, rate)
        self.course.before_step(p.step, self.steps)
        loss = yield from self.backward(self.order.batch(p.step))
        self.course.after_backward()
        outcome: Outcome = yield Due(loss)
        if not outcome.finite:
            self.refuse(outcome, rate)
        self.course.after_step()
        self.trainables.clear_gradients()
        p.step += 1
        p.losses.append(outcome.loss)
        p.seconds += time.perf_counter() - started
        self.report(Step(p.step, self.steps, outcome.loss, rate, p.seconds))

    def backward(self, batch: list[int]) -> Generator[Part, Tensor, Tensor]:
        """Leaves the gradient of the mean loss of the batch's examples, and returns that mean."""
        precise = torch.promote_types(self.trainables.parameters[0].dtype, torch.float32)
        total = torch.zeros((), device=self.device, dtype=precise)
        for part in self.order.parts(batch, self.world.rank):
            total += yield Part([self.examples[at] for at in part], len(part) / len(batch))
        total = self.world.join_gradients(self.trainables.parameters, total)
        if not self.checked:
            self.check_gradients()
        return total

    def losses(self, most: int, size: int | None = None, training: bool = True) -> Iterator[Tensor]:
        """Losses of training examples in the order of the run; see `Losses`."""
        batches = [self.order.batch(step) for step in range(self.order.steps_per_epoch)]
        seen = [at for batch in batches for at in batch][:most]
        size = size or len(batches[0])
        for at in range(0, len(seen), size):
            inputs = self.collate([self.examples[i] for i in seen[at : at + size]])
            dropout = self.settings.backbone_dropout
            mode = in_mode(self.model, training=training, dropout=dropout)
            with mode, autocast(self.device, self.precision):
                loss = self.objective.loss(self.model, inputs)
            yield loss

    def collate(self, examples: Sequence[Any]) -> dict[str, Any]:
        """A batch on the device."""
        return to_device(self.objective.collate(examples), self.device)

    def seek_trunk(self, batch: dict[str, Any]) -> None:
        """Finds what can be kept, once, in the state in which a step finds the model."""
        if self.sought:
            return
        self.sought, self.trunk = True, find_trunk(self.model, self.objective, batch)
        blocks = len(self.trunk.blocks) if self.trunk else 0
        self.report(Noted(f"cache_frozen: {blocks or 'no'} blocks run once for each example"))
        if self.trunk:
            size = self.settings.per_device_eval_batch_size
            self.trunk.learn([*self.examples, *self.dev_examples], self.collate, size)

    def feeding(self, examples: Sequence[Any]) -> AbstractContextManager[None]:
        """In it the model runs on these examples with what is kept of them."""
        return self.trunk.feeding(examples) if self.trunk else nullcontext()

    def check_gradients(self) -> None:
        self.checked = True
        pairs = zip(self.trainables.names, self.trainables.parameters, strict=True)
        missing = [n for n, p in pairs if p.grad is None and not self.course.asks_of(p)]
        if missing:
            raise self.unreached(missing)

    def unreached(self, names: list[str]) -> TrainError:
        known = self.trainables.names
        remedy = ", or accept it with allow_unused=True" if len(names) < len(known) else ""
        return TrainError(
            f"{len(names)} of {len(known)} trainable tensors receive no gradient: "
            f"{listing(names, 8)}; expected the loss to depend on each; enable the delta or leave "
            f"these tensors out{remedy}"
        )

    def refuse(self, outcome: Outcome, rate: float) -> None:
        s, p = self.settings, self.progress
        kept = "the model holds the parameters from before this step"
        if p.best is not None:
            self.trainables.load(p.best)
            kept = f"the model holds its best state, of step {p.best_step} (dev {p.best_dev:.4g})"
        raise TrainError(
            f"step {p.step + 1} of {self.steps} has loss {outcome.loss} and gradient norm "
            f"{outcome.norm} at learning rate {rate:.3g}; expected finite numbers; {kept}; lower "
            f"learning_rate (now {s.learning_rate:g}), lengthen warmup_steps (now "
            f"{s.warmup_steps:g}), lower max_grad_norm (now {s.max_grad_norm:g}) or use "
            f"precision='fp32' (now {s.precision!r})"
        )

    def evaluation_due(self) -> bool:
        every = self.settings.eval_steps
        if not self.evaluates:
            return False
        period = self.order.steps_per_epoch if isinstance(every, str) else every
        return self.progress.step % period == 0 or self.progress.step == self.steps

    def evaluate(self) -> None:
        s, p = self.settings, self.progress
        started = time.perf_counter()
        size = s.per_device_eval_batch_size
        with self.by_itself():
            found = predict(
                self.model, self.objective, self.dev_examples, size, self.precision, self.world,
                self.feeding,
            )  # fmt: skip
        value = task_score(self.task, found, self.dev)
        settled = self.course.settled
        best = settled and (p.best_dev is None or value > p.best_dev)
        p.waited = 0 if best or not settled else p.waited + 1
        if best:
            p.best_dev, p.best_step, p.best = value, p.step, self.trainables.copy()
        if s.early_stopping_patience is not None and p.waited >= s.early_stopping_patience:
            p.stopped = "early"
        p.curve.append((p.step, p.seconds, value))
        p.eval_seconds += time.perf_counter() - started
        self.report(Evaluated(p.step, "dev", self.task.metric, value, best))

    def save(self) -> None:
        self.note_memory()
        if not self.world.first:
            return
        path = self.saver.save(self.progress, self.trainables, self.optimizer)
        if path is not None:
            self.report(Checkpointed(self.progress.step, path))

    def note_memory(self) -> None:
        peaks = [self.progress.peak_memory_bytes, self.memory.read()]
        self.progress.peak_memory_bytes = max((n for n in peaks if n is not None), default=None)

    def result(self) -> TrainResult:
        p = self.progress
        self.note_memory()
        return TrainResult(
            best_dev=p.best_dev,
            best_step=p.best_step,
            steps=p.step,
            epochs=p.step / self.order.steps_per_epoch,
            curve=tuple(p.curve),
            losses=tuple(p.losses),
            seconds=p.seconds,
            eval_seconds=p.eval_seconds,
            peak_memory_bytes=p.peak_memory_bytes,
            precision=self.precision,
            stopped=p.stopped or "done",
        )

    def report(self, event: Event) -> None:
        if self.on_event is not None:
            self.on_event(event)
