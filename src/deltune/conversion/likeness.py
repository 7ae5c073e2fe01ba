"""How alike two deltas act: their outputs on unlabelled texts."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltune.attaching import attach
from deltune.delta import Delta, deltas
from deltune.errors import ConversionError
from deltune.tasks.encoding import pad, padding_mask
from deltune.training.evaluation import in_mode, to_device

BATCH = 32
"""Texts in one forward pass of a comparison."""
WRITTEN = 16
"""Tokens that a text-to-text model may write to a text that it is asked about."""


@dataclass(frozen=True, slots=True)
class Likeness:
    """How alike the outputs of two deltas are on some texts."""

    same: float | None
    """Share of equal decisions: classes, or next tokens (in a text-to-text model along what the
    source writes); None where a model decides nothing."""
    divergence: float
    """Mean of KL(source || other) over decisions; of the squared distance of hidden states, over
    that of the source's from their mean, where a model decides nothing."""


class Texts:
    """Texts as batches of tokens."""

    def __init__(self, tokenizer: Any, texts: Sequence[str], max_length: int) -> None:
        if tokenizer is None:
            raise ConversionError("texts need the model's tokenizer; give `tokenizer`")
        self.tokenizer, self.max_length = tokenizer, max_length
        self.rows = self.tokens(texts)

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of each text, cut to the length."""
        found = self.tokenizer(list(texts), truncation=True, max_length=self.max_length)
        return found["input_ids"]

    def batch(self, rows: Sequence[list[int]]) -> dict[str, Tensor]:
        """What a model is called with."""
        ids = pad(rows, self.tokenizer.pad_token_id)
        return {"input_ids": ids, "attention_mask": padding_mask(rows, ids.shape[1])}


def likeness(source: Delta, other: Delta | None, texts: Texts) -> Likeness:
    """How alike the outputs with two deltas are; without `other`, the backbone with the source's
    head."""
    model, bare = source.model, None
    if other is None and any(name.startswith("head.") for name in source.tensors()):
        bare = other = attach(model, "head", free_name(model, "head alone")).disable()
        copy_head(source, other)
    count = same = apart = squares = 0.0
    total: Tensor | float = 0.0
    decides = False
    try:
        with in_mode(model, training=False), torch.no_grad():
            for start in range(0, len(texts.rows), BATCH):
                batch = texts.batch(texts.rows[start : start + BATCH])
                batch = to_device(batch, next(model.parameters()).device)
                with acting(source, other):
                    batch = answered(model, batch)
                    wanted, decides = outputs_of(model, batch)
                with acting(other, source):
                    found, _ = outputs_of(model, batch)
                count += len(wanted)
                if decides:
                    same += float((wanted.argmax(-1) == found.argmax(-1)).sum())
                    apart += float(divergence(wanted, found).sum())
                else:
                    apart += float((wanted - found).square().sum())
                    squares += float(wanted.square().sum())
                    total = total + wanted.sum(dim=0)
    finally:
        if bare is not None:
            bare.detach()
    if decides:
        return Likeness(same / count, apart / count)
    wide = squares - float(torch.as_tensor(total).square().sum()) / count
    return Likeness(None, apart / max(wide, 1e-30))


def divergence(wanted: Tensor, found: Tensor) -> Tensor:
    """KL(softmax(wanted) || softmax(found)) of each row."""
    one, other = wanted.log_softmax(-1), found.log_softmax(-1)
    return F.kl_div(other, one, log_target=True, reduction="none").sum(-1)


def answered(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch, with what the model writes to it (greedy, up to `WRITTEN` tokens) for its decoder
    to read, where it is one that writes text to text."""
    writer: Any = model
    both = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if not (both and writer.can_generate()):
        return batch
    written = writer.generate(**batch, max_new_tokens=WRITTEN, do_sample=False, num_beams=1)
    last = writer.generation_config.eos_token_id
    ends = torch.tensor([] if last is None else last, dtype=torch.long, device=written.device)
    ended = torch.isin(written[:, 1:-1], ends).cumsum(dim=1) > 0
    read = torch.ones_like(written[:, :-1])
    read[:, 1:] = ~ended
    return {**batch, "decoder_input_ids": written[:, :-1], "decoder_attention_mask": read}


def outputs_of(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, bool]:
    """What a model says of each example, or of each token of a language model: logits, or hidden
    states if it decides nothing."""
    outputs = model(**batch)
    logits = getattr(outputs, "logits", None)
    rows = outputs.last_hidden_state if logits is None else logits
    if rows.ndim == 3:
        rows = rows[batch.get("decoder_attention_mask", batch["attention_mask"]).bool()]
    return rows.float(), logits is not None


def copy_head(source: Delta, target: Delta) -> None:
    """Gives a delta the head of another."""
    own, theirs = source.tensors(), target.tensors()
    heads = [name for name in theirs if name.startswith("head.")]
    target.load_tensors({**theirs, **{name: own[name] for name in heads if name in own}})


@contextmanager
def acting(one: Delta | None, off: Delta | None) -> Generator[None]:
    """With one delta acting and another not, whatever was before."""
    before = [(delta, delta.enabled) for delta in (one, off) if delta is not None]
    try:
        if off is not None:
            off.disable()
        if one is not None:
            one.enable()
        yield
    finally:
        for delta, was in before:
            delta.enable() if was else delta.disable()


def free_name(model: nn.Module, name: str) -> str:
    """A name that no delta of the model has."""
    taken, number = deltas(model), 1
    while (free := name if number == 1 else f"{name} {number}") in taken:
        number += 1
    return free
