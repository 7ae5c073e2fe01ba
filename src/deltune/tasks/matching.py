"""The objective that matches a text with the names of its labels."""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltune.delta import deltas
from deltune.errors import DataError
from deltune.tasks.encoding import IGNORED, Example, Prompts, masked_mean, pad, padding_mask

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from deltune.tasks.task import Record

SCALE = 20.0
"""Of the cosines, as in sentence-transformers."""


class LabelMatch:
    """Cross-entropy over the likeness of a text to each label's name, or to each option:

        logit_c = 20 cos(e(x), e_0(c)),    e(x) = mean over the tokens of the last hidden states

    with e_0 of the backbone as it was pre-trained, computed once. There is no head: everything that
    a task needs is in the delta, so deltas of different label sets have the same shape, and one of
    them can be asked about the labels of another. It wants a backbone that was made for sentence
    embeddings, and labels that are words.

    Source: mean pooling and the cosine are those of Reimers and Gurevych, "Sentence-BERT", 2019,
    arXiv:1908.10084; names of labels as their prototypes as in Yin et al., "Benchmarking Zero-shot
    Text Classification", 2019, arXiv:1909.00161.

    Args:
        model: the backbone; its deltas are disabled for the names.
        texts: every label or option that will be asked about.
        prompts: makes the tokens of inputs.
        names: makes the tokens of labels and options.
        labels: the label set; None where every record has options.
        pad_id: the padding token.
        multiple: batches are padded to a multiple of this length.

    Attributes:
        truncated: How many inputs were cut so far.
    """

    def __init__(
        self, model: "PreTrainedModel", texts: Iterable[str], prompts: Prompts, names: Prompts, *,
        labels: Sequence[str] | None, pad_id: int, multiple: int = 1,
    ) -> None:  # fmt: skip
        self.prompts, self.labels = prompts, tuple(labels or ())
        self._pad, self._multiple = pad_id, multiple
        texts = list(dict.fromkeys(texts))
        self._place = {text: place for place, text in enumerate(texts)}
        self._known = self._embedded(model, names.encode(texts, [0] * len(texts)))

    @property
    def truncated(self) -> int:
        """How many inputs were cut so far."""
        return self.prompts.truncated

    def rows(self, example: Example) -> int:
        """Returns how many rows of a batch an example has."""
        return 1

    def encode(self, records: Sequence["Record"]) -> list[Example]:
        """Returns the examples of records."""
        prompts = self.prompts.encode([record.input for record in records], [0] * len(records))
        return [self._example(record, ids) for record, ids in zip(records, prompts, strict=True)]

    def collate(self, examples: Sequence[Example]) -> dict[str, Any]:
        """Returns a batch; `choices` are the texts that each example chooses from."""
        rows = [example.prompt for example in examples]
        ids = pad(rows, self._pad, multiple=self._multiple)
        return {
            "input_ids": ids,
            "attention_mask": padding_mask(rows, ids.shape[1]),
            "labels": torch.tensor([example.label for example in examples]),
            "choices": [example.choices for example in examples],
        }

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """Returns the mean loss of the batch's examples."""
        return F.cross_entropy(self.scores(model, batch), batch["labels"])

    @torch.no_grad()
    def predict(self, model: nn.Module, batch: dict[str, Any]) -> list[str]:
        """Returns the nearest label or option of each example."""
        best = self.scores(model, batch).argmax(dim=-1).tolist()
        return [choices[at] for choices, at in zip(batch["choices"], best, strict=True)]

    def scores(self, model: Any, batch: dict[str, Any]) -> Tensor:
        """(examples, most choices), minus infinity where an example has fewer."""
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        texts = pooled(model(**inputs).last_hidden_state, inputs["attention_mask"])
        known = self._known.to(texts.device)
        found = [
            SCALE * known[[self._place[text] for text in choices]] @ row
            for row, choices in zip(texts, batch["choices"], strict=True)
        ]
        return nn.utils.rnn.pad_sequence(found, batch_first=True, padding_value=-torch.inf)

    def _example(self, record: "Record", ids: list[int]) -> Example:
        choices = record.options or self.labels
        if record.target and record.target not in choices:
            raise DataError(
                f"the target `{record.target}` of the record `{record.input[:60]}` is none of its "
                "labels or options; correct it"
            )
        unknown = next((text for text in choices if text not in self._place), None)
        if unknown is not None or not choices:
            raise DataError(
                f"the record `{record.input[:60]}` chooses from `{unknown}`, which the task did "
                "not have when it was put to the model; make the objective of this task anew"
            )
        label = choices.index(record.target) if record.target else IGNORED
        return Example(ids, [], label, choices)

    @torch.no_grad()
    def _embedded(self, model: Any, rows: Sequence[list[int]], size: int = 256) -> Tensor:
        training, device = model.training, next(model.parameters()).device
        found = []
        with ExitStack() as stack:
            stack.callback(model.train, training)
            model.eval()
            for delta in deltas(model).values():
                stack.enter_context(delta.disabled())
            for start in range(0, len(rows), size):
                part = rows[start : start + size]
                ids = pad(part, self._pad).to(device)
                mask = padding_mask(part, ids.shape[1]).to(device)
                hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state
                found.append(pooled(hidden, mask))
        return torch.cat(found)


def pooled(hidden: Tensor, mask: Tensor) -> Tensor:
    """The mean over real tokens, of length one (rows, width)."""
    return F.normalize(masked_mean(hidden, mask), dim=-1)
