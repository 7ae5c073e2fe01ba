"""The objective of a classification head."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltune.errors import DataError, closest, listing
from deltune.tasks.encoding import IGNORED, Example, Prompts, pad, padding_mask

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from deltune.tasks.task import Record


class ClassHead:
    """Cross-entropy over the classes of an `AutoModelForSequenceClassification`.

    Attributes:
        truncated: How many inputs were cut so far.
    """

    def __init__(
        self, labels: Sequence[str], prompts: Prompts, *, pad_id: int, multiple: int = 1
    ) -> None:
        self.labels, self.prompts = tuple(labels), prompts
        self._index = {label: index for index, label in enumerate(self.labels)}
        self._pad, self._multiple = pad_id, multiple

    @property
    def truncated(self) -> int:
        """How many inputs were cut so far."""
        return self.prompts.truncated

    def rows(self, example: Example) -> int:
        """Returns how many rows of a batch an example has."""
        return 1

    def encode(self, records: Sequence["Record"]) -> list[Example]:
        """Returns the examples of records."""
        classes = [self._class(record) for record in records]
        prompts = self.prompts.encode([record.input for record in records], [0] * len(records))
        return [Example(ids, [], label) for ids, label in zip(prompts, classes, strict=True)]

    def _class(self, record: "Record") -> int:
        if record.target and record.target not in self._index:
            raise DataError(
                f"the label `{record.target}` of the record `{record.input[:60]}` is not in the "
                f"label set{closest(record.target, self.labels)}; the labels are "
                f"{listing(self.labels)}; correct the record"
            )
        return self._index[record.target] if record.target else IGNORED

    def collate(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Returns a batch that is ready for `model(**batch)`."""
        rows = [example.prompt for example in examples]
        ids = pad(rows, self._pad, multiple=self._multiple)
        labels = torch.tensor([example.label for example in examples])
        mask = padding_mask(rows, ids.shape[1])
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Returns the mean loss of the batch's examples."""
        return F.cross_entropy(_logits(model, batch), batch["labels"])

    @torch.no_grad()
    def predict(self, model: nn.Module, batch: dict[str, Tensor]) -> list[str]:
        """Returns the label of each example."""
        return [self.labels[at] for at in _logits(model, batch).argmax(dim=-1).tolist()]


def check_head(model: "PreTrainedModel", labels: Sequence[str]) -> None:
    """Refuses a head whose classes are not the labels in their order."""
    classes: Any = model.config.id2label or {}
    names = [classes[index] for index in sorted(classes)]
    unnamed = names == [f"LABEL_{index}" for index in range(len(names))]
    if len(names) != len(labels) or not (unnamed or names == list(labels)):
        raise DataError(
            f"the head of `{type(model).__name__}` has the classes {listing(names)} and the task "
            f"has {listing(labels)}; expected the same in the same order; load the model with "
            "`load_model(..., labels=task.labels)`"
        )


def _logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    return model(**inputs).logits.float()
