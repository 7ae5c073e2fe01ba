"""Tasks of token numbers for tiny models, and runs of them at once and by themselves."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltune.tasks.task import Record, Task

FIRST, LAST, LABELS = 4, 60, ("a", "b", "c")


@dataclass(frozen=True)
class Example:
    ids: tuple[int, ...]
    label: int

    @property
    def length(self) -> int:
        return len(self.ids)


def number_task(
    seed: int, longest: int = 9, train: int = 12, dev: int = 6, labels: int = 3
) -> Task:
    """Rows of random tokens; the label is the remainder of their sum."""
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(train + dev):
        size = int(torch.randint(2, longest + 1, (), generator=draw))
        ids = torch.randint(FIRST, LAST, (size,), generator=draw).tolist()
        rows.append(Record(" ".join(map(str, ids)), LABELS[sum(ids) % labels]))
    used = LABELS[:labels]
    return Task(
        f"numbers {seed}", "classification", "accuracy", used, rows[:train], rows[train:], []
    )


class Numbers:
    """Cross-entropy of a head, or of the next token where the model gives logits of tokens."""

    def __init__(self, labels: int = 3, pad: int = 0) -> None:
        self.labels, self.pad = labels, pad

    def encode(self, records: Sequence[Record]) -> list[Example]:
        return [
            Example(tuple(map(int, row.input.split())), LABELS.index(row.target)) for row in records
        ]

    def collate(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        rows = [torch.tensor(example.ids) for example in examples]
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.pad)
        mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        labels = torch.tensor([example.label for example in examples])
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def _logits(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        return model(**inputs).logits

    def loss(self, model: Any, batch: dict[str, Tensor]) -> Tensor:
        logits = self._logits(model, batch)
        if logits.ndim == 2:
            return F.cross_entropy(logits[:, : self.labels], batch["labels"])
        aims = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), aims[:, 1:].flatten())

    def predict(self, model: Any, batch: dict[str, Tensor]) -> list[str]:
        logits = self._logits(model, batch)
        if logits.ndim == 3:
            logits = logits[:, 0]
        return [LABELS[at] for at in logits[:, : self.labels].argmax(-1).tolist()]


def dropping(model: Any, p: float) -> Any:
    """The model with dropout of p wherever it has dropout."""
    for module in model.modules():
        for owner in (module, getattr(module, "config", None)):
            for name in ("p", "dropout_prob", "attention_dropout", "attention_probs_dropout_prob"):
                if isinstance(getattr(owner, name, None), float):
                    setattr(owner, name, p)
    return model
