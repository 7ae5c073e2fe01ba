"""Slots: where the rows of a prompt stand among the tokens of each row of a batch.

A slot stands beside one real token of the row, told by its number or by its id, so padding on
either side moves it along.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from deltune.errors import AttachError, SpecError


class Slot(NamedTuple):
    """Some prompt rows together, before or behind one real token.

    Attributes:
        length: the number of prompt rows.
        number: of the token among the real ones of its row; negative counts from the end.
        token: the token's id instead of its number; the first one with it.
        behind: whether the slot stands behind the token.
    """

    length: int
    number: int = 0
    token: int | None = None
    behind: bool = False

    @classmethod
    def at(cls, length: int, place: int | str) -> "Slot":
        """A slot by its written place.

        Args:
            length: the number of prompt rows.
            place: `2` or `-1`, before that real token; `end`, behind the last; `before 103` or
                `after 103`, beside the first token with this id.

        Raises:
            SpecError: another place.
        """
        if isinstance(place, int):
            return cls(length, place)
        if place == "end":
            return cls(length, -1, behind=True)
        found = re.fullmatch(r"(before|after) ([0-9]{1,9})", place)
        if found is None:
            raise SpecError(
                f"`{place}` is no place of a prompt; use the number of a token (`0`, `1`, `-1`), "
                "`end`, or `before 103` and `after 103` with the id of a token"
            )
        return cls(length, token=int(found[2]), behind=found[1] == "after")

    @property
    def leads(self) -> bool:
        """Whether the slot stands before the first real token."""
        return self.number == 0 and self.token is None

    @property
    def place(self) -> str:
        """The place as people say it."""
        if self.token is not None:
            return f"{'behind' if self.behind else 'before'} the token with id {self.token}"
        return "behind the last token" if self.behind else f"before token {self.number}"


class Joint:
    """Rows with slots among their tokens: which column of the longer row is what.

    Args:
        slots: in their order, where several have one place.
        beside: (batch, slots), the column of the token that each stands beside.
        n: tokens in a row.

    Attributes:
        tokens: (batch, n), the new columns of the tokens.
    """

    def __init__(self, slots: Sequence[Slot], beside: Tensor, n: int) -> None:
        self.slots, self.beside = slots, beside.split(1, 1)
        self.gaps = [at + slot.behind for slot, at in zip(slots, self.beside, strict=True)]
        column = torch.arange(n, device=beside.device)
        self.tokens = column.expand(beside.shape[0], -1)
        for slot, gap in zip(slots, self.gaps, strict=True):
            self.tokens = self.tokens + slot.length * (column >= gap)
        rows = [gap + self._before(k) + self._within(k) for k, gap in enumerate(self.gaps)]
        self.source = torch.cat([*rows, self.tokens], 1).argsort(1)

    def joined(self, prompt: Tensor, x: Tensor) -> Tensor:
        """`x` (batch, n, ...) with the rows of all slots (batch, length, ...) at their places."""
        return columns(torch.cat([prompt.to(x.dtype), x], 1), self.source)

    def alike(self, x: Tensor) -> Tensor:
        """`x` (batch, n) for tokens and slots: a slot has the value of the token beside it."""
        own = [
            x.gather(1, at).expand(-1, slot.length)
            for slot, at in zip(self.slots, self.beside, strict=True)
        ]
        return self.joined(torch.cat(own, 1), x)

    def counted(self, positions: Tensor) -> Tensor:
        """The positions (batch, n) of the tokens moved on, and those of the slots between them."""
        own = [
            positions.gather(1, self.beside[k]) + slot.behind + self._before(k) + self._within(k)
            for k, slot in enumerate(self.slots)
        ]
        column = torch.arange(positions.shape[1], device=positions.device)
        return self.joined(torch.cat(own, 1), positions + self.tokens - column)

    def closing(self) -> Tensor:
        """The column of each token, or of the end of the slots behind it: what predicts the next
        token in a causal model."""
        width = self.source.shape[1]
        end = self.tokens.new_full((self.tokens.shape[0], 1), width)
        return torch.cat([self.tokens[:, 1:], end], 1) - 1

    def _before(self, k: int) -> Tensor | int:
        """The rows of other slots before slot `k`."""
        gap = self.gaps[k]
        return sum(
            other.length * ((self.gaps[m] <= gap) if m < k else (self.gaps[m] < gap))
            for m, other in enumerate(self.slots)
            if m != k
        )

    def _within(self, k: int) -> Tensor:
        return torch.arange(self.slots[k].length, device=self.tokens.device)


def beside(
    slots: Sequence[Slot], batch: int, n: int, device: torch.device, mask: Tensor | None,
    ids: Tensor | None,
) -> Tensor:  # fmt: skip
    """The column of the token that each slot stands beside, (batch, slots).

    Raises:
        AttachError: a row lacks such a token, its mask hides tokens between real ones, or ids are
            asked for and embeddings were given.
    """
    first = leading(mask, batch, device, n)
    if all(slot.leads for slot in slots):
        return first[:, None].expand(-1, len(slots))
    real = torch.ones(batch, n, dtype=torch.bool, device=device) if mask is None else mask.bool()
    count = real.sum(1)
    at, present = [], []
    for slot in slots:
        if slot.token is None:
            at.append((first if slot.number >= 0 else first + count) + slot.number)
            present.append(count > slot.number if slot.number >= 0 else count >= -slot.number)
        elif ids is None:
            raise AttachError(
                f"a prompt stands {slot.place}, and the input was given as embeddings; give "
                "`input_ids`, or place the prompt by the number of a token"
            )
        else:
            found = real & (ids == slot.token)
            at.append(found.long().argmax(1))
            present.append(found.any(1))
    whole = real.flip(1).long().argmax(1) + count + first == n
    _check(slots, torch.stack(present, 1), whole, count)
    return torch.stack(at, 1)


def _check(slots: Sequence[Slot], present: Tensor, whole: Tensor, count: Tensor) -> None:
    good = present.all(1) & whole
    if good.all():
        return
    row = int(good.long().argmin())
    if present[row].all():
        raise AttachError(
            f"the attention mask of row {row} hides tokens between real ones, where the places of "
            "a prompt cannot be counted; mask padding at the sides only, or use a prompt before "
            "the first token"
        )
    slot = slots[int(present[row].long().argmin())]
    raise AttachError(
        f"a prompt stands {slot.place}, and row {row} has no such token among its {count[row]} "
        "real ones; write it into every input, or place the prompt elsewhere"
    )


def leading(mask: Tensor | None, batch: int, device: torch.device, most: int) -> Tensor:
    """The number of padding tokens before the first real one, below `most`, for each row."""
    if mask is None:
        return torch.zeros(batch, dtype=torch.long, device=device)
    return (mask.long().cumsum(1) == 0).sum(1).clamp(max=most - 1)


def widened(mask: Tensor, present: Tensor, most: int) -> Tensor:
    """A mask with `present` (batch or 1, length) joined before the real tokens, of which the first
    is below `most`."""
    batch, first = mask.shape[0], leading(mask, mask.shape[0], mask.device, most)
    joint = Joint([Slot(present.shape[1])], first[:, None], mask.shape[1])
    return joint.joined(present.expand(batch, -1).to(mask.dtype), mask)


def columns(x: Tensor, chosen: Tensor) -> Tensor:
    """x[b, chosen[b, j]] for every row."""
    return x[torch.arange(x.shape[0], device=x.device)[:, None], chosen.expand(x.shape[0], -1)]
