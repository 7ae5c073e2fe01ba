"""What the objectives over language models share: batches, losses, tokens of targets."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltune.errors import DeltuneError
from deltune.mechanisms.output import HEAD
from deltune.tasks.encoding import IGNORED, Ids, continuations, pad, padding_mask

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Language:
    """The facts of a language model and its tokenizer that make batches.

    Batches of a decoder are padded on the right, where positions count alike in every
    architecture; only `generate` gets left padding.
    """

    tokenizer: "PreTrainedTokenizerBase"
    pad: int
    eos: int
    start: int | None
    """The first token of an encoder-decoder's decoder; none for a decoder alone."""
    multiple: int = 1

    @property
    def decoder(self) -> bool:
        """Whether the model is a decoder alone."""
        return self.start is None

    def targets(self, texts: Sequence[str], lead: str) -> list[Ids]:
        """Returns the tokens of targets, each ended by the end-of-sequence token."""
        if self.decoder:
            found = continuations(self.tokenizer, [lead + text for text in texts])
            return [[*ids, self.eos] for ids in found]
        if not texts:
            return []
        written: Any = self.tokenizer(text_target=list(texts), verbose=False)
        return [ids if ids[-1:] == [self.eos] else [*ids, self.eos] for ids in written["input_ids"]]

    def batch(self, prompts: Sequence[Ids], targets: Sequence[Ids]) -> dict[str, Tensor]:
        """Returns the keyword arguments of the model, labels included."""
        rows = prompts
        if self.decoder:
            rows = [p + t for p, t in zip(prompts, targets, strict=True)]
            masked = [[IGNORED] * len(p) + t for p, t in zip(prompts, targets, strict=True)]
        ids = pad(rows, self.pad, multiple=self.multiple)
        mask = padding_mask(rows, ids.shape[1])
        if self.decoder:
            labels = pad(masked, IGNORED, multiple=self.multiple)
            return {"input_ids": ids, "attention_mask": mask, "labels": labels}
        labels = pad(targets, IGNORED, multiple=self.multiple)
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "decoder_input_ids": self.shifted(labels),
            "labels": labels,
        }

    def shifted(self, labels: Tensor) -> Tensor:
        """Returns what the decoder of an encoder-decoder reads to write `labels`."""
        first = torch.full_like(labels[:, :1], self.start or 0)
        read = torch.cat([first, labels[:, :-1]], dim=1)
        return read.masked_fill(read == IGNORED, self.pad)

    def logits(self, model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Returns logits and labels, both shifted so that each logit predicts its label."""
        labels = batch["labels"]
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        found = model(**inputs).logits[:, -labels.shape[1] :]
        return (found[:, :-1], labels[:, 1:]) if self.decoder else (found, labels)

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """Returns the mean loss of the batch's targets; of a model whose output layer is lean,
        without the logits of what is no target."""
        output = model.__dict__.get(HEAD)
        if output is None or not torch.is_grad_enabled():
            found, labels = self.logits(model, batch)
            counted = labels != IGNORED
            tokens = found[counted].float()
            return target_loss(F.cross_entropy(tokens, labels[counted], reduction="none"), counted)
        with output.open():
            states, labels = self.logits(model, batch)
        counted = labels != IGNORED
        return target_loss(output.losses(states[counted], labels[counted]), counted)


def language_of(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", multiple: int = 1
) -> Language:
    """Reads the facts from a model and its tokenizer."""
    start = None
    if model.config.is_encoder_decoder:
        start = _first(model, "decoder_start_token_id")
        if start is None:
            raise DeltuneError(
                f"`{type(model).__name__}` names no `decoder_start_token_id`; set it in "
                "`model.config` to the token that its decoder starts with"
            )
    pad_id, eos_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    if pad_id is None or eos_id is None:
        raise DeltuneError(
            f"the tokenizer has the padding token {pad_id} and the end-of-sequence token {eos_id}; "
            "both are needed; set `pad_token` and `eos_token`, or load it with `load_model`"
        )
    return Language(tokenizer, pad_id, eos_id, start, multiple)


def _first(model: "PreTrainedModel", name: str) -> int | None:
    for config in (getattr(model, "generation_config", None), model.config):
        if (value := getattr(config, name, None)) is not None:
            return value
    return None


def target_loss(losses: Tensor, counted: Tensor) -> Tensor:
    """Returns the mean over examples of the mean negative log-likelihood of their target tokens.

    Being a mean over examples, it is the same however a batch is split for accumulation.

    Args:
        losses: of the tokens that count, one after the other.
        counted: (examples, tokens), which do.
    """
    sums = losses.new_zeros(len(counted)).index_add(0, counted.nonzero()[:, 0], losses)
    return (sums / counted.sum(dim=1).clamp(min=1)).mean()
