"""Oracles: the backbone before training; the uninterrupted run; the handle's own vector."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import deltune as dt
from deltune.errors import TrainError
from deltune.training.events import Event, Step
from deltune.training.loop import TrainResult, evaluate, train
from train_toy import LABELS, Example, Squares, settings, toy_task
from zoo import ZOO

BERT = ZOO["bert"]
SPECS = [
    "lora(rank=2, dropout=0.2)",
    "adapter(width=4)",
    "adapter(width=4, robust=True)",
    "prefix(tokens=3)",
    "prompt(tokens=3)",
    "bitfit",
    "lora(rank=2) + prompt(tokens=2)",
    "head",
    "last(layers=1)",
    "full",
]


class Digits(Squares):
    """The toy numbers as tokens of a tiny BERT with three classes, of which two occur."""

    def collate(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        ids = torch.tensor([[10 + int(n) for n in e.numbers] for e in examples])
        return {"input_ids": ids, "labels": torch.tensor([e.label for e in examples])}

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model(**batch).loss

    def predict(self, model: nn.Module, batch: dict[str, Tensor]) -> list[str]:
        logits = model(input_ids=batch["input_ids"]).logits[:, :2]
        return [LABELS[at] for at in logits.argmax(-1).tolist()]


def attached(spec: str) -> tuple[nn.Module, Any]:
    model = BERT.build(0)
    return model, dt.attach(model, spec, seed=0)


def run(model: nn.Module, delta: Any, **extra: Any) -> TrainResult:
    chosen = settings(learning_rate=0.02, num_train_epochs=3, eval_steps=2, max_grad_norm=0)
    return train(model, None, toy_task(24, 10), delta, chosen, objective=Digits(), **extra)


@pytest.mark.parametrize("spec", SPECS)
def test_trains_the_delta_and_nothing_else(spec: str) -> None:
    model, delta = attached(spec)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    start, trained = delta.vector(), {id(p) for p in delta.parameters()}
    result = run(model, delta)
    assert not torch.equal(delta.vector(), start)
    assert not model.training
    for name, p in model.named_parameters():
        assert id(p) in trained or torch.equal(p, before[name]), name
    found = evaluate(model, None, toy_task(24, 10), objective=Digits())
    assert found.value == result.best_dev
    delta.detach()
    fresh = BERT.build(0)
    for (name, p), q in zip(model.named_parameters(), fresh.parameters(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("spec", SPECS)
def test_resumes_bit_for_bit_from_the_delta_alone(spec: str, tmp_path: Path) -> None:
    def kill(event: Event) -> None:
        if isinstance(event, Step) and event.step == 11:
            raise KeyboardInterrupt

    (straight, one), (killed, two), (resumed, three) = (attached(spec) for _ in range(3))
    whole = run(straight, one)
    with pytest.raises(KeyboardInterrupt):
        run(killed, two, folder=tmp_path, on_event=kill)
    tensors = load_file(tmp_path / "step-10" / "model.safetensors")
    assert sum(t.numel() for t in tensors.values()) == three.count()
    with torch.no_grad():
        for p in three.parameters():
            p.normal_()
    parts = run(resumed, three, folder=tmp_path)
    assert torch.equal(one.vector(), three.vector())
    assert parts.losses == whole.losses and parts.best_step == whole.best_step


def test_another_spec_is_refused(tmp_path: Path) -> None:
    run(*attached("lora(rank=2)"), folder=tmp_path)
    with pytest.raises(TrainError, match=r"`spec`:\s+checkpoint: lora\(rank=2\)\s+this run:   bit"):
        run(*attached("bitfit"), folder=tmp_path)


def test_a_delta_that_does_not_act_cannot_train() -> None:
    model, delta = attached("lora(rank=2)")
    delta.disable()
    with pytest.raises(TrainError, match=r"receive no gradient: .*enable the delta"):
        run(model, delta)
    other = BERT.build(1)
    with pytest.raises(TrainError, match="`delta` has parameters that are not in this Bert"):
        run(other, delta)


def test_two_deltas_train_one_after_the_other() -> None:
    model, first = attached("lora(rank=2)")
    second = dt.attach(model, "adapter(width=4)", name="second", seed=1, head=False)
    before = second.vector()
    run(model, first)
    assert torch.equal(second.vector(), before)
    after = first.vector()
    run(model, second)
    assert torch.equal(first.vector(), after) and not torch.equal(second.vector(), before)


def _dropping(p: float) -> nn.Module:
    model = BERT.build(0)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = p
    return model


@pytest.mark.parametrize("spec", ["bitfit", "prefix(tokens=3)", "adapter(width=4)", "full"])
def test_without_backbone_dropout_it_is_the_model_without_dropout(spec: str) -> None:
    vectors = []
    for p, dropout in ((0.4, False), (0.0, True), (0.4, True)):
        model = _dropping(p)
        delta = dt.attach(model, spec, seed=0)
        chosen = settings(learning_rate=0.02, max_steps=3, backbone_dropout=dropout)
        train(model, None, toy_task(24, 10), delta, chosen, objective=Digits())
        vectors.append(delta.vector())
        assert not model.training
    torch.testing.assert_close(vectors[0], vectors[1])
    assert not torch.allclose(vectors[0], vectors[2])


def test_a_delta_s_own_dropout_acts_without_that_of_the_backbone() -> None:
    vectors = []
    for spec in ("lora(rank=2)", "lora(rank=2, dropout=0.5)"):
        model = _dropping(0.4)
        delta = dt.attach(model, spec, seed=0)
        chosen = settings(learning_rate=0.02, max_steps=3, backbone_dropout=False)
        train(model, None, toy_task(24, 10), delta, chosen, objective=Digits())
        vectors.append(delta.vector())
    assert not torch.allclose(vectors[0], vectors[1])


def test_gradient_checkpointing_without_backbone_dropout_is_refused() -> None:
    model, delta = attached("lora(rank=2)")
    model.gradient_checkpointing_enable()
    chosen = settings(backbone_dropout=False)
    with pytest.raises(TrainError, match=r"backbone_dropout is False and .* checkpointing"):
        train(model, None, toy_task(24, 10), delta, chosen, objective=Digits())
    assert not model.training
