"""Oracles: torch's optimiser and transformers' schedule stepped by hand; exact small arithmetic."""

import math
import random
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from deltune.errors import DataError, TrainError
from deltune.tasks.task import Task
from deltune.training.batches import Order
from deltune.training.events import Evaluated, Event, Finished, Noted, Started, Step
from deltune.training.loop import TrainResult, train
from deltune.training.precision import native_bf16
from train_toy import Example, Squares, linear, network, settings, toy_task


def run(model: nn.Module, task: Task, objective: Any = None, **changes: Any) -> TrainResult:
    return train(model, None, task, None, settings(**changes), objective=objective or Squares())


def by_hand(model: nn.Module, task: Task, schedule: Any, warmup: int, **changes: Any) -> list:
    """The run in the plainest words: whole batches, unfused AdamW, torch's clipping."""
    chosen, objective = settings(**changes), Squares()
    examples = objective.encode(task.train)
    order = Order([e.length for e in examples], chosen)
    steps = chosen.total_steps(order.steps_per_epoch)
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=chosen.learning_rate, foreach=False, fused=False)
    scheduler = schedule(optimizer, warmup, steps)
    losses = []
    for step in range(steps):
        batch = objective.collate([examples[at] for at in order.batch(step)])
        optimizer.zero_grad()
        loss = objective.loss(model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), chosen.max_grad_norm)
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_equals_the_run_by_hand(kind: str, accumulate: int) -> None:
    task, ours, theirs = toy_task(train=11), network().eval(), network().eval()
    for model in (ours, theirs):
        model[3].p = 0.0
    common = {"lr_scheduler_type": kind, "weight_decay": 0.1, "max_grad_norm": 0.7}
    common |= {"warmup_steps": 2, "num_train_epochs": 5, "load_best_model_at_end": False}
    sizes = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3}
    sizes = sizes if accumulate == 3 else {"per_device_train_batch_size": 3}
    schedule = getattr(transformers, f"get_{kind}_schedule_with_warmup")
    result = run(ours, task, **common, **sizes)
    losses = by_hand(theirs, task, schedule, 2, **common, **sizes)
    assert result.losses == pytest.approx(losses, rel=1e-10)
    assert (result.steps, result.epochs, result.stopped) == (20, 5.0, "done")
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("size", "accumulate"), [(8, 1), (4, 2), (1, 8), (3, 4)])
@pytest.mark.parametrize("examples", [8, 5])
def test_gradient_does_not_depend_on_accumulation(
    size: int, accumulate: int, examples: int
) -> None:
    task, seen = toy_task(train=examples), []
    hook = register_optimizer_step_pre_hook(
        lambda optimizer, *_: seen.append(
            [p.grad.clone() for group in optimizer.param_groups for p in group["params"]]
        )
    )
    try:
        run(
            linear(),
            task,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulate,
            max_steps=1,
            max_grad_norm=0,
        )
    finally:
        hook.remove()
    rows = Squares().encode(task.train)
    x = torch.tensor([row.numbers for row in rows], dtype=torch.float64)
    y = torch.tensor([2.0 * row.label - 1 for row in rows], dtype=torch.float64)
    weight, bias = -2 * (y @ x) / len(rows), -2 * y.sum() / len(rows)
    exact = examples == 8 and size != 3  # then every share is a power of two
    tolerance = 0.0 if exact else 1e-14
    torch.testing.assert_close(seen[0][0][0], weight, rtol=0, atol=tolerance)
    torch.testing.assert_close(seen[0][1][0], bias, rtol=0, atol=tolerance)


class Script(Squares):
    """Plays given dev values: the first `value * 10` predictions of each evaluation are right."""

    def __init__(self, values: list[float], task: Task) -> None:
        self.values, self.dev = iter(values), [row.target for row in task.dev]
        self.rights: list[int] = []

    def predict(self, model: nn.Module, batch: dict[str, Tensor]) -> list[str]:
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
        right = round(next(self.values) * len(self.dev))
        return ["right" if at < right else "wrong" for at in range(len(batch["x"]))]

    def scored(self) -> Task:
        rows = [replace(row, target="right") for row in toy_task(dev=10).dev]
        return replace(toy_task(), labels=("right", "wrong"), dev=rows)

    def encode(self, records: Any) -> list[Example]:
        return [Example((1.0, 2.0, 3.0), at % 2, 5) for at, _ in enumerate(records)]


def played(values: list[float], **changes: Any) -> tuple[TrainResult, list[Tensor], nn.Module]:
    task = toy_task(dev=10)
    objective, model, after = Script(values, task), linear(), []

    def watch(event: Event) -> None:
        if isinstance(event, Step):
            after.append(model.weight.detach().clone())

    chosen = settings(
        max_steps=len(values), eval_steps=1, per_device_train_batch_size=10, **changes
    )
    result = train(
        model, None, objective.scored(), None, chosen, objective=objective, on_event=watch
    )
    return result, after, model


def test_best_state_is_restored_and_the_first_of_equals_wins() -> None:
    values = [0.2, 0.7, 0.4, 0.7, 0.1]
    result, after, model = played(values)
    assert (result.best_dev, result.best_step) == (0.7, 2)
    assert [(step, value) for step, _, value in result.curve] == list(enumerate(values, start=1))
    assert torch.equal(model.weight, after[1]) and not torch.equal(after[1], after[4])


def test_last_state_on_request() -> None:
    result, after, model = played([0.2, 0.7, 0.4], load_best_model_at_end=False)
    assert result.best_step == 2 and torch.equal(model.weight, after[2])


def test_early_stopping_counts_evaluations_since_the_best() -> None:
    result, after, _ = played([0.3, 0.2, 0.5, 0.5, 0.4, 0.9], early_stopping_patience=2)
    assert (result.stopped, result.steps, result.best_step, len(after)) == ("early", 5, 3, 5)
    assert len(result.losses) == 5


def test_evaluation_times() -> None:
    def steps(**changes: Any) -> list[int]:
        result = run(linear(), toy_task(), **changes)
        return [step for step, _, _ in result.curve]

    assert steps(eval_steps="epoch") == [3, 6]
    assert steps(eval_steps="epoch", max_steps=5) == [3, 5]
    assert steps(eval_steps=4) == [4, 6]
    assert steps(eval_steps=4, eval_on_start=True) == [0, 4, 6]
    assert steps(eval_steps="no") == []


def test_without_evaluation_no_dev_is_needed() -> None:
    task = toy_task(dev=0)
    result = run(linear(), task, eval_steps="no")
    assert (result.best_dev, result.best_step) == (None, None)
    with pytest.raises(DataError, match=r"`dev` of task `toy` has no records.*eval_steps='no'"):
        run(linear(), task)
    with pytest.raises(DataError, match="`train` of task `toy` has no records"):
        run(linear(), toy_task(train=0))


def test_events_tell_the_run() -> None:
    events: list[Event] = []
    task = toy_task()
    result = train(
        linear(), None, task, None, settings(), objective=Squares(), on_event=events.append
    )
    assert events[0] == Started(6, 3, 10, 4, 0, "fp32")
    assert events[-1] == Finished(result)
    names = [type(event).__name__ for event in events[1:-1]]
    assert names == ["Step", "Step", "Step", "Evaluated"] * 2
    steps = [event for event in events if isinstance(event, Step)]
    assert [event.step for event in steps] == [1, 2, 3, 4, 5, 6]
    assert [event.lr for event in steps] == pytest.approx([0.05 * (6 - k) / 6 for k in range(6)])
    assert tuple(event.loss for event in steps) == result.losses
    assert all(a.seconds < b.seconds for a, b in pairwise(steps))
    values = [event.value for event in events if isinstance(event, Evaluated)]
    assert values == [value for _, _, value in result.curve]
    assert result.peak_memory_bytes is None or result.peak_memory_bytes > 10 * 2**20


def test_modes_gradients_and_generators_come_back() -> None:
    model = network()
    model[1].eval()
    modes = [module.training for module in model.modules()]
    states = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].copy()
    run(model, toy_task())
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert numpy.array_equal(numpy.random.get_state()[1], states[2])


def test_the_seed_decides_dropout_and_order() -> None:
    def trained(seed: int, draw: int) -> Tensor:
        model = network()
        torch.manual_seed(draw)
        run(model, toy_task(), seed=seed)
        return model[0].weight.detach()

    assert torch.equal(trained(3, draw=1), trained(3, draw=2))
    assert not torch.equal(trained(3, draw=1), trained(4, draw=1))


class Handle:
    """What the loop asks of a delta."""

    name = "toy"
    spec = "toy"

    def __init__(self, *parameters: nn.Parameter) -> None:
        self._parameters = list(parameters)

    def parameters(self) -> list[nn.Parameter]:
        return self._parameters


def test_only_the_delta_trains_and_others_get_no_gradient() -> None:
    model, grads = network(), []
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    handle = Handle(model[4].weight, model[4].bias)

    def watch(event: Event) -> None:
        grads.append([p.grad is None and p.requires_grad for p in model[0].parameters()])

    train(model, None, toy_task(), handle, settings(), objective=Squares(), on_event=watch)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {"4.weight", "4.bias"}
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(any(row) for row in grads)


def test_nothing_to_train() -> None:
    model = linear().requires_grad_(False)
    with pytest.raises(TrainError, match="nothing to train: no parameter requires a gradient"):
        run(model, toy_task())
    with pytest.raises(TrainError, match="2 tensors of the delta are frozen: `weight`, `bias`"):
        train(model, None, toy_task(), Handle(*model.parameters()), objective=Squares())
    with pytest.raises(TrainError, match="`toy` has parameters that are not in this Linear"):
        train(model, None, toy_task(), Handle(*network().parameters()), objective=Squares())


def test_a_tensor_without_gradient_is_named() -> None:
    model = linear()
    model.register_parameter("idle", nn.Parameter(torch.zeros(2)))
    with pytest.raises(TrainError, match=r"1 of 3 trainable tensors receive no gradient: `idle`"):
        run(model, toy_task())
    assert not model.weight.any()
    run(model, toy_task(), allow_unused=True)
    assert model.weight.any() and not model.idle.any()


class Explodes(Squares):
    """Returns a loss that is not finite in the given forward pass."""

    def __init__(self, at: int, value: float, gradient_only: bool = False) -> None:
        self.left, self.value, self.gradient_only = at, value, gradient_only

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        loss = super().loss(model, batch)
        self.left -= 1
        if self.left:
            return loss
        if self.gradient_only:
            zero = (model.weight * 0).sum()
            return loss + (zero.sqrt() * 0 if self.value != self.value else zero.sqrt())
        return loss * self.value


@pytest.mark.parametrize("gradient_only", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_not_finite_stops_with_the_best_state(value: float, gradient_only: bool) -> None:
    model, kept = linear(), []

    def watch(event: Event) -> None:
        if isinstance(event, Evaluated):
            kept.append(model.weight.detach().clone())

    with torch.no_grad():
        model.weight.fill_(0.25)
    objective = Explodes(5, value, gradient_only)
    with pytest.raises(TrainError) as caught:
        train(model, None, toy_task(), None, settings(), objective=objective, on_event=watch)
    text = str(caught.value)
    assert "step 5 of 6 has loss" in text and "learning rate 0.0167" in text
    assert "best state, of step 3" in text and "lower learning_rate (now 0.05)" in text
    assert str(value) in text or "nan" in text
    assert len(kept) == 1 and torch.equal(model.weight, kept[0])


def test_not_finite_before_any_evaluation_leaves_the_step_out() -> None:
    model, seen = linear(), []

    def watch(event: Event) -> None:
        seen.append(model.weight.detach().clone())

    with pytest.raises(TrainError, match="the parameters from before this step"):
        train(
            model,
            None,
            toy_task(),
            objective=Explodes(2, math.nan),
            settings=settings(),
            on_event=watch,
        )
    assert torch.equal(model.weight, seen[-1]) and torch.isfinite(model.weight).all()


def test_bf16_autocast_is_where_it_should_be() -> None:
    seen = []

    class Half(Squares):
        def collate(self, examples: Any) -> dict[str, Tensor]:
            return {name: t.float() for name, t in super().collate(examples).items()}

        def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
            seen.append(("loss", model(batch["x"]).dtype))
            return super().loss(model, batch)

        def predict(self, model: nn.Module, batch: dict[str, Tensor]) -> list[str]:
            seen.append(("predict", model(batch["x"]).dtype))
            return super().predict(model, batch)

    auto = torch.bfloat16 if native_bf16(torch.device("cpu")) else torch.float32
    for precision, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32), ("auto", auto)):
        seen.clear()
        model = linear().float()
        result = run(model, toy_task(), Half(), precision=precision, max_steps=1)
        assert set(seen) == {("loss", dtype), ("predict", dtype)}
        assert result.precision == ("bf16" if dtype is torch.bfloat16 else "fp32")
        assert model.weight.dtype is torch.float32 and model.weight.any()


@pytest.mark.parametrize(
    ("capabilities", "native"),
    [
        ({"avx2": True, "avx512_bf16": False, "amx_bf16": False}, False),
        ({"avx2": True, "avx512_bf16": True}, True),
        ({"amx_bf16": True, "avx512_bf16": False}, True),
        ({}, False),
    ],
)
def test_emulated_bf16_is_never_chosen_and_never_silent(
    capabilities: dict[str, bool], native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)

    def notes(precision: str) -> list[str]:
        events: list[Event] = []
        chosen = settings(precision=precision, max_steps=1)
        train(linear(), None, toy_task(), None, chosen, objective=Squares(), on_event=events.append)
        assert isinstance(events[0], Started)
        assert events[0].precision == ("bf16" if precision == "bf16" or native else "fp32")
        return [event.text for event in events if isinstance(event, Noted)]

    assert notes("auto") == []
    assert len(notes("bf16")) == (0 if native else 1)


def test_cut_inputs_are_noted() -> None:
    class Cuts(Squares):
        truncated = 5

        def encode(self, records: Any) -> list[Example]:
            self.truncated += 2
            return super().encode(records)

    events: list[Event] = []
    train(linear(), None, toy_task(), settings=settings(), objective=Cuts(), on_event=events.append)
    assert events[1] == Noted("4 of 17 inputs are longer than max_length and cut")


def test_buffers_beside_trained_parameters_follow_the_best_state() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1)).double()
    means = []

    def watch(event: Event) -> None:
        if isinstance(event, Evaluated):
            means.append(model[0].running_mean.clone())

    result = train(
        model,
        None,
        toy_task(),
        None,
        settings(num_train_epochs=6),
        objective=Squares(),
        on_event=watch,
    )
    at = [step for step, _, _ in result.curve].index(result.best_step)
    assert torch.equal(model[0].running_mean, means[at])
    assert not torch.equal(means[0], means[-1])
