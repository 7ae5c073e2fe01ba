"""The objective that writes the target."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from deltune.tasks.encoding import IGNORED, Example, Prompts, pad, padding_mask
from deltune.tasks.language import Language

if TYPE_CHECKING:
    from deltune.tasks.task import Record


class Generation:
    """Trains a language model to write the target, and predicts by letting it write.

    The loss is the mean negative log-likelihood of the target's tokens and the end of the sequence
    after it; the prompt is not learned. Prediction is greedy unless there are several `beams`.

    Attributes:
        truncated: How many inputs were cut so far.
    """

    def __init__(
        self,
        language: Language,
        prompts: Prompts,
        *,
        max_new_tokens: int = 64,
        beams: int = 1,
    ) -> None:
        self.language, self.prompts = language, prompts
        self.max_new_tokens, self.beams = max_new_tokens, beams

    @property
    def truncated(self) -> int:
        """How many inputs were cut so far."""
        return self.prompts.truncated

    def encode(self, records: Sequence["Record"]) -> list[Example]:
        """Returns the examples of records."""
        targets = self.language.targets([r.target for r in records], self.prompts.template.lead)
        room = [max(len(ids), self.max_new_tokens) for ids in targets]
        prompts = self.prompts.encode([record.input for record in records], room)
        return [Example(prompt, ids) for prompt, ids in zip(prompts, targets, strict=True)]

    def collate(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Returns a batch that is ready for `model(**batch)`."""
        return self.language.batch([e.prompt for e in examples], [e.target for e in examples])

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Returns the mean loss of the batch's examples."""
        return self.language.loss(model, batch)

    @torch.no_grad()
    def predict(self, model: nn.Module, batch: dict[str, Tensor]) -> list[str]:
        """Returns what the model writes for each example."""
        ids, mask = batch["input_ids"], batch["attention_mask"]
        if self.language.decoder:
            ids, mask = self._prompts_left(batch)
        writer: Any = model
        written = writer.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            num_beams=self.beams,
            pad_token_id=self.language.pad,
            eos_token_id=self.language.eos,
        )
        if self.language.decoder:
            written = written[:, ids.shape[1] :]
        texts = self.language.tokenizer.batch_decode(written, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def _prompts_left(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The prompts of a batch alone, padded on the left as `generate` needs it."""
        prompt = (batch["attention_mask"] == 1) & (batch["labels"] == IGNORED)
        rows = [row[kept].tolist() for row, kept in zip(batch["input_ids"], prompt, strict=True)]
        ids = pad(rows, self.language.pad, left=True, multiple=self.language.multiple)
        mask = padding_mask(rows, ids.shape[1], left=True)
        return ids.to(prompt.device), mask.to(prompt.device)
