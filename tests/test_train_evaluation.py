"""Oracle: the metric of predictions made one by one, in order."""

import pytest
import torch
from torch import nn

from deltune.errors import DataError
from deltune.training.evaluation import evaluate
from train_toy import LABELS, Squares, network, toy_task


class Recorded(Squares):
    def __init__(self) -> None:
        self.sizes: list[list[int]] = []

    def collate(self, examples):
        self.sizes.append([example.length for example in examples])
        return super().collate(examples)


@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize("split", ["train", "dev"])
def test_equals_one_by_one(batch_size: int, split: str) -> None:
    task, model, objective = toy_task(train=20, dev=11), network(), Recorded()
    records = getattr(task, split)
    result = evaluate(model, None, task, split, batch_size=batch_size, objective=objective)
    model.eval()
    alone = []
    for row in records:
        x = torch.tensor([[float(n) for n in row.input.split()]], dtype=torch.float64)
        alone.append(LABELS[int(model(x).item() > 0)])
    assert list(result.predictions) == alone
    right = sum(a == row.target for a, row in zip(alone, records, strict=True))
    assert result.value == pytest.approx(right / len(records))
    assert result.metric == "accuracy" and result.seconds > 0
    lengths = [length for batch in objective.sizes for length in batch]
    assert lengths == sorted(lengths, reverse=True)


def test_leaves_the_model_as_it_was() -> None:
    model = network()
    model[3].eval()
    modes = [module.training for module in model.modules()]
    before = [p.detach().clone() for p in model.parameters()]
    state = torch.get_rng_state()
    evaluate(model, None, toy_task(), objective=Squares())
    assert [module.training for module in model.modules()] == modes
    assert torch.is_grad_enabled() and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))


class Fails(Squares):
    def predict(self, model: nn.Module, batch: dict) -> list[str]:
        raise RuntimeError("broken")


def test_the_mode_comes_back_after_a_failure() -> None:
    model = network()
    with pytest.raises(RuntimeError, match="broken"):
        evaluate(model, None, toy_task(), objective=Fails())
    assert all(module.training for module in model.modules()) and torch.is_grad_enabled()


def test_unknown_and_empty_splits() -> None:
    with pytest.raises(DataError, match="unknown split `test2`"):
        evaluate(network(), None, toy_task(), "test2", objective=Squares())
    with pytest.raises(DataError, match="the split `dev` of task `toy` has no records"):
        evaluate(network(), None, toy_task(dev=0), objective=Squares())
