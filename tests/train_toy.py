"""A task, models and an objective so small that training them has closed forms."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deltune.tasks.task import Record, Task
from deltune.training import checkpoint
from deltune.training.settings import TrainSettings

LABELS = ("minus", "plus")


@dataclass(frozen=True)
class Example:
    numbers: tuple[float, ...]
    label: int
    length: int


def toy_task(train: int = 10, dev: int = 7, seed: int = 0) -> Task:
    """The label is the sign of the sum of three small whole numbers."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for numbers in torch.randint(-3, 4, (train + dev, 3), generator=generator).tolist():
        rows.append(Record(" ".join(map(str, numbers)), LABELS[int(sum(numbers) > 0)]))
    return Task("toy", "classification", "accuracy", LABELS, rows[:train], rows[train:], [])


class Squares:
    """Mean squared error against -1 and +1: with whole numbers all gradients are exact."""

    def encode(self, records: Sequence[Record]) -> list[Example]:
        return [
            Example(tuple(map(float, row.input.split())), LABELS.index(row.target), len(row.input))
            for row in records
        ]

    def collate(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        numbers = torch.tensor([example.numbers for example in examples], dtype=torch.float64)
        labels = torch.tensor([float(2 * e.label - 1) for e in examples], dtype=torch.float64)
        return {"x": numbers, "y": labels}

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return (model(batch["x"]).squeeze(-1) - batch["y"]).square().mean()

    def predict(self, model: nn.Module, batch: dict[str, Tensor]) -> list[str]:
        return [LABELS[int(value > 0)] for value in model(batch["x"]).squeeze(-1)]


def linear() -> nn.Linear:
    """All zero, in float64."""
    model = nn.Linear(3, 1).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model


def network(seed: int = 0) -> nn.Sequential:
    """With dropout; leaves the global generator as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = (nn.Linear(3, 8), nn.LayerNorm(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 1))
        return nn.Sequential(*layers).double()


def settings(**changes: Any) -> TrainSettings:
    usual = {"learning_rate": 0.05, "num_train_epochs": 2, "per_device_train_batch_size": 4}
    return TrainSettings(**(usual | changes))


def stopped(monkeypatch: pytest.MonkeyPatch, count: int) -> list[int]:
    """Lets a run be interrupted when so many checkpoints are written; the steps of all that are."""
    write, taken = checkpoint.write, list[int]()

    def stopping(folder: Path, step: int, *rest: Any) -> Path:
        taken.append(step)
        path = write(folder, step, *rest)
        if len(taken) == count:
            raise KeyboardInterrupt
        return path

    monkeypatch.setattr(checkpoint, "write", stopping)
    return taken
