"""Token sequences out of texts: templates, special tokens, explicit truncation, padding."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from deltune.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = list[int]
IGNORED = -100
"""The label of positions that no loss counts, as everywhere in transformers."""


@dataclass(frozen=True, slots=True)
class Template:
    """The texts around a record's input and target.

    A decoder reads `before`, the input and `after` as its prompt and goes on with `lead` and the
    target. An encoder reads the first three; its decoder writes the bare target.

    Example:
        >>> Template.parse("Review: {input}\\nSentiment: {target}")
        Template(before='Review: ', after='\\nSentiment:', lead=' ')
    """

    before: str = ""
    after: str = ""
    lead: str = ""

    @classmethod
    def parse(cls, pattern: str) -> "Template":
        """Reads a pattern with `{input}` and, at its end, `{target}`.

        White space before the target belongs to the target: most tokenizers join it to the word.
        """
        before, found, rest = pattern.partition("{input}")
        middle, wanted, end = rest.partition("{target}")
        if not found or not wanted or end or "{input}" in rest:
            raise DataError(
                f"the template `{pattern}` does not have the form of "
                "`... {input} ... {target}`; write both once, the target at the end"
            )
        after = middle.rstrip()
        return cls(before, after, middle[len(after) :])


@dataclass(frozen=True, slots=True)
class Example:
    """A record as tokens."""

    prompt: Ids
    """What the model reads, special tokens included."""
    target: Ids
    """What it should write; empty for a class head."""
    label: int = IGNORED
    """The class, or the place of the target among the options."""
    choices: tuple[str, ...] = ()
    """The texts of the options."""
    options: tuple[Ids, ...] = ()
    """The tokens of the options."""

    @property
    def length(self) -> int:
        """Tokens of the example, to group examples by."""
        return len(self.prompt) + len(self.target)


class Prompts:
    """Makes the tokens that a model reads, and counts the inputs that it had to cut.

    Only the record's input is cut, on the tokenizer's `truncation_side`; never the template, the
    special tokens or the target.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        template: Template,
        *,
        max_length: int | None,
        positions: int | None,
        decoder: bool,
    ) -> None:
        self.tokenizer, self.template = tokenizer, template
        self.truncated = 0
        self._positions = positions
        self._max_length = min(length for length in (max_length, positions, 10**9) if length)
        first, last = special_tokens(tokenizer)
        self._first = first
        self._last = (continuations(tokenizer, [template.after])[0] if template.after else []) + (
            [] if decoder else last
        )
        self._decoder = decoder

    def encode(self, texts: Sequence[str], targets: Sequence[int]) -> list[Ids]:
        """Returns the prompt of each text; a decoder's must leave room for `targets` tokens."""
        bodies = tokens(self.tokenizer, [self.template.before + text for text in texts])
        return [
            self._fit(body, size, text)
            for body, size, text in zip(bodies, targets, texts, strict=True)
        ]

    def _fit(self, body: Ids, target: int, text: str) -> Ids:
        room = self._max_length
        if self._decoder and self._positions:
            room = min(room, self._positions - target)
        room -= len(self._first) + len(self._last)
        if room < 1:
            raise DataError(
                f"no token of the input `{text[:60]}` fits: the limit is {self._max_length}, the "
                f"template and special tokens take {len(self._first) + len(self._last)} and the "
                f"target {target}, of {self._positions} positions; raise max_length, shorten the "
                "template or leave the record out"
            )
        if len(body) > room:
            self.truncated += 1
            body = body[-room:] if self.tokenizer.truncation_side == "left" else body[:room]
        return [*self._first, *body, *self._last]


def tokens(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]) -> list[Ids]:
    """Returns the tokens of each text alone, without special tokens, in one call."""
    if not texts:
        return []
    found: Any = tokenizer(list(texts), add_special_tokens=False, verbose=False)
    return found["input_ids"]


def special_tokens(tokenizer: "PreTrainedTokenizerBase") -> tuple[Ids, Ids]:
    """Returns the special tokens that the tokenizer puts before and after a text."""
    probe: Any = tokenizer("a")["input_ids"]
    body = tokens(tokenizer, ["a"])[0]
    for start in range(len(probe) - len(body) + 1):
        if body and probe[start : start + len(body)] == body:
            return probe[:start], probe[start + len(body) :]
    raise DataError(
        f"the tokenizer `{type(tokenizer).__name__}` writes `a` as {body} alone and as {probe} "
        "with special tokens; expected the former inside the latter; use another tokenizer"
    )


def pair_tokens(tokenizer: "PreTrainedTokenizerBase") -> tuple[Ids, Ids, Ids]:
    """Returns the special tokens that the tokenizer puts before, between and after two texts."""
    probe: Any = tokenizer("a", "a")["input_ids"]
    body = tokens(tokenizer, ["a"])[0]
    places = [at for at in range(len(probe)) if probe[at : at + len(body)] == body]
    if not body or len(places) != 2 or places[1] < places[0] + len(body):
        raise DataError(
            f"the tokenizer `{type(tokenizer).__name__}` writes `a` as {body} alone and as {probe} "
            "twice; expected the former two times inside the latter; use another tokenizer"
        )
    one, two = places
    return probe[:one], probe[one + len(body) : two], probe[two + len(body) :]


def continuations(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]) -> list[Ids]:
    """Returns the tokens of each text as they are after another text.

    Some tokenizers put a space before whatever they are given, so the text is tokenized after an
    anchor, whose tokens are dropped.
    """
    anchor = ":"
    head = tokens(tokenizer, [anchor])[0]
    joined = tokens(tokenizer, [anchor + text for text in texts])
    return [
        ids[len(head) :] if ids[: len(head)] == head else tokens(tokenizer, [text])[0]
        for ids, text in zip(joined, texts, strict=True)
    ]


def pad(rows: Sequence[Ids], value: int, *, left: bool = False, multiple: int = 1) -> Tensor:
    """Returns rows of tokens as one tensor, padded to the longest (up to a multiple)."""
    width = max(map(len, rows))
    width += -width % multiple
    fill = [[value] * (width - len(row)) for row in rows]
    if left:
        return torch.tensor([[*gap, *row] for gap, row in zip(fill, rows, strict=True)])
    return torch.tensor([[*row, *gap] for gap, row in zip(fill, rows, strict=True)])


def padding_mask(rows: Sequence[Ids], width: int, *, left: bool = False) -> Tensor:
    """Returns 1 where `pad` put a token and 0 where it padded."""
    lengths = torch.tensor([len(row) for row in rows])[:, None]
    places = torch.arange(width)
    return (places >= width - lengths if left else places < lengths).long()


def masked_mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """The mean over real tokens (rows, width), in float32."""
    weights = mask.unsqueeze(-1).to(torch.float32)
    return (hidden.float() * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1)
