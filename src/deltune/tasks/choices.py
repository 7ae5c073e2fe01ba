"""The objective of multiple choice with an encoder: a score for each pair of input and option."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltune.errors import DataError, closest, listing
from deltune.tasks.encoding import (
    IGNORED,
    Example,
    Ids,
    pad,
    padding_mask,
    pair_tokens,
    tokens,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from deltune.tasks.encoding import Template
    from deltune.tasks.task import Record


class ChoiceHead:
    """Cross-entropy over the options of a record, each scored by a head with one output.

    The score of option o of the input x is the head's output for the pair (x, o), written as the
    tokenizer joins two texts. Where a pair is too long the input is cut, and an option only where
    it takes more than half of the room.

    Attributes:
        truncated: How many inputs were cut so far.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        template: "Template",
        *,
        max_length: int,
        multiple: int = 1,
    ) -> None:
        self.tokenizer, self.template = tokenizer, template
        self.truncated = 0
        self._frame, self._multiple = pair_tokens(tokenizer), multiple
        special = sum(map(len, self._frame))
        self._room = max_length - special
        if self._room < 2:
            raise DataError(
                f"max_length is {max_length} and a pair has {special} special tokens; "
                "expected room for a token of the input and one of the option; raise max_length"
            )

    def rows(self, example: Example) -> int:
        """Returns how many rows of a batch an example has."""
        return len(example.options)

    def encode(self, records: Sequence["Record"]) -> list[Example]:
        """Returns the examples of records: the rows of all their options."""
        for record in records:
            _check(record)
        before, after = self.template.before, self.template.after
        inputs = tokens(self.tokenizer, [before + record.input + after for record in records])
        texts = list(dict.fromkeys(text for record in records for text in record.options))
        written = dict(zip(texts, tokens(self.tokenizer, texts), strict=True))
        return [
            self._example(record, ids, [written[text] for text in record.options])
            for record, ids in zip(records, inputs, strict=True)
        ]

    def collate(self, examples: Sequence[Example]) -> dict[str, Any]:
        """Returns a batch whose rows are the options of all examples, one after another.

        `sizes` says how many rows each example has, `choices` their texts.
        """
        rows = [row for example in examples for row in example.options]
        pad_id: Any = self.tokenizer.pad_token_id
        ids = pad(rows, pad_id, multiple=self._multiple)
        return {
            "input_ids": ids,
            "attention_mask": padding_mask(rows, ids.shape[1]),
            "labels": torch.tensor([example.label for example in examples]),
            "sizes": [len(example.options) for example in examples],
            "choices": [example.choices for example in examples],
        }

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """Returns the mean loss of the batch's examples."""
        return F.cross_entropy(_scores(model, batch), batch["labels"])

    @torch.no_grad()
    def predict(self, model: nn.Module, batch: dict[str, Any]) -> list[str]:
        """Returns the best-scored option of each example."""
        best = _scores(model, batch).argmax(dim=-1).tolist()
        return [choices[at] for choices, at in zip(batch["choices"], best, strict=True)]

    def _example(self, record: "Record", ids: Ids, options: list[Ids]) -> Example:
        options = [option[: max(self._room - len(ids), self._room // 2)] for option in options]
        room = self._room - max(map(len, options))
        if len(ids) > room:
            self.truncated += 1
            ids = ids[len(ids) - room :] if self._cut_left else ids[:room]
        first, middle, last = self._frame
        rows = tuple([*first, *ids, *middle, *option, *last] for option in options)
        label = record.options.index(record.target) if record.target else IGNORED
        return Example(max(rows, key=len), [], label, record.options, rows)

    @property
    def _cut_left(self) -> bool:
        return self.tokenizer.truncation_side == "left"


def _scores(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """(examples, most options) with minus infinity where an example has fewer."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    scores = model(**inputs).logits.float().squeeze(-1)
    sizes: list[int] = batch["sizes"]
    return nn.utils.rnn.pad_sequence(
        scores.split(sizes), batch_first=True, padding_value=-torch.inf
    )


def _check(record: "Record") -> None:
    if len(record.options) < 2:
        raise DataError(
            f"the record `{record.input[:60]}` has {len(record.options)} options; multiple choice "
            "needs at least two; correct it"
        )
    if record.target and record.target not in record.options:
        raise DataError(
            f"the target `{record.target}` of the record `{record.input[:60]}` is not among the "
            f"options {listing(record.options)}{closest(record.target, record.options)}; correct it"
        )
