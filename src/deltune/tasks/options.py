"""The objective that scores options by the likelihood a language model gives them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltune.errors import DataError, closest, listing
from deltune.tasks.encoding import IGNORED, Example, Ids, Prompts
from deltune.tasks.language import Language

if TYPE_CHECKING:
    from deltune.tasks.task import Record

_LOGITS = 2**27
"""Floats of logits in one forward pass of the scoring: 512 MiB."""


class OptionScoring:
    """Scores each option of a record by its log-likelihood after the input.

    The score of option o with tokens o_1..o_n after the input x is sum_t log p(o_t | x, o_<t),
    without the end of the sequence, divided by n when `normalise`. The options are those of the
    record or, in a classification task, the labels. An option without any token is never chosen.

    The loss is the mean negative log-likelihood of the target's tokens (`loss_on="target"`), or
    the cross-entropy of the softmax over the options' scores (`loss_on="options"`), which trains
    on the wrong options too and costs one row for each.

    Attributes:
        truncated: How many inputs were cut so far.
    """

    def __init__(
        self,
        language: Language,
        prompts: Prompts,
        *,
        labels: Sequence[str] | None = None,
        normalise: bool = True,
        loss_on: Literal["target", "options"] = "target",
    ) -> None:
        if loss_on not in ("target", "options"):
            raise DataError(
                f"loss_on is `{loss_on}`{closest(loss_on, ('target', 'options'))}; "
                "choose `target` or `options`"
            )
        self.language, self.prompts = language, prompts
        self.labels = tuple(labels or ())
        self.normalise, self.loss_on = normalise, loss_on
        self._row_tokens = max(512, min(2**14, _LOGITS // len(language.tokenizer)))

    @property
    def truncated(self) -> int:
        """How many inputs were cut so far."""
        return self.prompts.truncated

    def encode(self, records: Sequence["Record"]) -> list[Example]:
        """Returns the examples of records; each different option is tokenized once."""
        choices = [record.options or self.labels for record in records]
        for record, found in zip(records, choices, strict=True):
            self._check(record, found)
        texts = list(dict.fromkeys(text for found in choices for text in found))
        written = self.language.targets(texts, self.prompts.template.lead)
        ids = {text: row[:-1] for text, row in zip(texts, written, strict=True)}
        ids |= {text: [] for text in texts if not text.strip()}
        longest = [max(len(ids[text]) for text in found) for found in choices]
        prompts = self.prompts.encode([record.input for record in records], longest)
        return [
            Example(
                prompt,
                ids[record.target] if record.target else [],
                found.index(record.target) if record.target else IGNORED,
                found,
                tuple(ids[text] for text in found),
            )
            for record, prompt, found in zip(records, prompts, choices, strict=True)
        ]

    def _check(self, record: "Record", choices: tuple[str, ...]) -> None:
        if not choices:
            raise DataError(
                f"the record `{record.input[:60]}` has no options and the task no labels; expected "
                "either; add them, or use the objective Generation"
            )
        if record.target and record.target not in choices:
            raise DataError(
                f"the target `{record.target}` of the record `{record.input[:60]}` is not among "
                f"the options {listing(choices)}{closest(record.target, choices)}; correct it"
            )

    def collate(self, examples: Sequence[Example], *, choices: bool = True) -> dict[str, Any]:
        """Returns the batch of the targets; `examples` in it holds what the options need.

        With `choices=False` it is left out and the batch is ready for `model(**batch)`, as the
        Trainer of transformers calls a model.
        """
        prompts, targets = [e.prompt for e in examples], [e.target for e in examples]
        batch: dict[str, Any] = dict(self.language.batch(prompts, targets))
        return batch | {"examples": list(examples)} if choices else batch

    def loss(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """Returns the mean loss of the batch's examples."""
        if self.loss_on == "target":
            inputs = {name: value for name, value in batch.items() if name != "examples"}
            return self.language.loss(model, inputs)
        examples: list[Example] = batch["examples"]
        losses = [
            F.cross_entropy(found[None], torch.tensor([example.label], device=found.device))
            for found, example in zip(self.scores(model, batch), examples, strict=True)
        ]
        return torch.stack(losses).mean()

    @torch.no_grad()
    def predict(self, model: nn.Module, batch: dict[str, Any]) -> list[str]:
        """Returns the best-scored option of each example."""
        examples: list[Example] = batch["examples"]
        return [
            example.choices[int(found.argmax())]
            for found, example in zip(self.scores(model, batch), examples, strict=True)
        ]

    def scores(self, model: nn.Module, batch: dict[str, Any]) -> list[Tensor]:
        """Returns the scores of the options of each example of the batch."""
        examples: list[Example] = batch["examples"]
        device = batch["input_ids"].device
        sizes = [len(example.options) for example in examples]
        options = [ids for example in examples for ids in example.options]
        total = torch.zeros(len(options), device=device)
        for chunk in self._chunks(_rows(examples)):
            places, values = self._row_scores(model, chunk, device)
            total = total.index_add(0, places, values)
        counts = torch.tensor([len(ids) for ids in options], device=device)
        total = total.masked_fill(counts == 0, -torch.inf)
        if self.normalise:
            total = total / counts.clamp(min=1)
        return list(total.split(sizes))

    def _chunks(self, rows: "list[_Row]") -> "Iterator[list[_Row]]":
        """Rows of similar length, as many at once as the logits have room for."""
        chunk: list[_Row] = []
        for row in sorted(rows, key=lambda row: row.length):
            if chunk and (len(chunk) + 1) * row.length > self._row_tokens:
                yield chunk
                chunk = []
            chunk.append(row)
        if chunk:
            yield chunk

    def _row_scores(
        self, model: nn.Module, rows: "list[_Row]", device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """The log-likelihood of every token of the rows' options, and whose option it is."""
        batch = self.language.batch([row.prompt for row in rows], [row.target for row in rows])
        logits, _ = self.language.logits(model, {k: v.to(device) for k, v in batch.items()})
        spots: dict[tuple[int, int], int] = {}
        wanted: list[tuple[int, int, int]] = []
        for index, row in enumerate(rows):
            first = len(row.prompt) - 1 if self.language.decoder else 0
            for place, ids in row.options:
                for step, token in enumerate(ids):
                    spot = spots.setdefault((index, first + step), len(spots))
                    wanted.append((place, spot, token))
        row_of, step_of = torch.tensor(list(spots), device=device).T
        places, spot_of, token_of = torch.tensor(wanted, device=device).T
        likelihoods = logits[row_of, step_of].float().log_softmax(dim=-1)
        return places, likelihoods[spot_of, token_of]


@dataclass(frozen=True, slots=True)
class _Row:
    """One sequence to run, and the options (numbered through the batch) whose tokens it covers."""

    prompt: Ids
    target: Ids
    options: list[tuple[int, Ids]]

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.target)


def _rows(examples: Sequence[Example]) -> list[_Row]:
    """The fewest rows that score all options.

    An option needs a row that starts with all its tokens but the last, so options that differ in
    the last token only, and all options of one token, share a row.
    """
    rows: list[_Row] = []
    place = 0
    for example in examples:
        numbered = sorted(((ids[:-1], ids, place + i) for i, ids in enumerate(example.options)))
        head: Ids | None = None
        # Sorted from the back, a beginning comes after everything that starts with it.
        for start, ids, number in reversed(numbered):
            if not ids:
                continue
            if head is None or head[: len(start)] != start:
                head = start
                rows.append(_Row(example.prompt, ids, []))
            rows[-1].options.append((number, ids))
        place += len(example.options)
    return rows
