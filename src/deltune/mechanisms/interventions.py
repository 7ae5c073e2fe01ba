"""Interventions: a function of the hidden state behind a block, at some tokens of each row alone.

    h_i <- h_i + s f(h_i)    for the first `prefix` and the last `suffix` real tokens of a row

with other tensors for the last ones, which come first where a token is both, unless they are tied.

Tokens are counted in each row, padding on either side aside and those of a key/value cache
included. Where tokens only look back, the last ones of a sequence that goes on are not the last.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltune.errors import AttachError
from deltune.mechanisms.insert import Insert, InsertUnit, needs_width
from deltune.mechanisms.masks import causal, numbered
from deltune.mechanisms.tensors import Param
from deltune.mechanisms.unit import Unit
from deltune.sites.discover import Atlas
from deltune.sites.site import Site
from deltune.sites.where import Where
from deltune.spec import require

LAST = "_last"
"""What is behind the names of the tensors for the last tokens."""


class InterventionUnit(InsertUnit):
    """An intervention behind one block."""

    def note_mask(
        self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        numbers = numbered(attention, given, given[self.names[0]].shape[1])
        self.noted[:] = [self.mine(numbers)]

    def chosen(self) -> tuple[Tensor, Tensor]:
        """True for the first tokens, and for the last ones, (batch or 1, tokens, 1). To be asked
        once for each call."""
        numbers, spec = self.allowed(), self.spec
        assert numbers is not None and isinstance(spec, Intervention)
        last = numbers.amax(-1, keepdim=True) - numbers < spec.suffix
        real = numbers >= 0
        pair = (numbers < spec.prefix) & real, last & real
        return pair[0][..., None], pair[1][..., None]


@dataclass(frozen=True)
class Intervention(Insert):
    """A method that intervenes: define `tensors` with `each`, and `change`."""

    unit: ClassVar[type[Unit]] = InterventionUnit

    rank: int = field(default=4, kw_only=True)
    """Number r of directions."""
    prefix: int = field(default=3, kw_only=True)
    """Tokens at the beginning of each row that are changed."""
    suffix: int = field(default=0, kw_only=True)
    """Tokens at its end; 0 where tokens only look back."""
    tied: bool = field(default=False, kw_only=True)
    """Whether the first and the last tokens have the same tensors."""
    dropout: float = field(default=0.0, kw_only=True)
    """Dropout on the changed states, in training."""
    where: Where = "block"
    """The blocks."""

    def __post_init__(self) -> None:
        require(self.rank >= 1, self, "rank", "1 or more")
        require(self.prefix >= 0, self, "prefix", "0 or more")
        require(self.suffix >= 0, self, "suffix", "0 or more")
        require(self.prefix + self.suffix > 0, self, "prefix", "1 or more without `suffix`")
        require(0.0 <= self.dropout < 1.0, self, "dropout", "in [0, 1)")

    def change(self, t: Unit, x: Tensor, end: str) -> Tensor:
        """f(x) with the tensors of the unit `t` whose names have this end; shape of `x`."""
        raise NotImplementedError

    def each(self, site: Site, atlas: Atlas, own: dict[str, Param]) -> dict[str, Param]:
        """The tensors at a site, from those for the tokens of one end.

        Raises:
            AttachError: tokens at the end of what only looks back, or tokens beyond its window.
        """
        needs_width(site, self.kind)
        attention: Any = atlas.modules[site.attention]
        if self.suffix and causal(site, atlas):
            raise AttachError(
                f"`{self}`: at `{site.path}` tokens only look back, and the last ones of a text "
                "that goes on are others in training than in generation; use `suffix=0`"
            )
        window = getattr(attention, "sliding_window", None)
        if isinstance(window, int) and 0 < window < self.prefix:
            raise AttachError(
                f"`{self}`: `{site.attention}` sees {window} tokens, so that the first "
                f"{self.prefix} of a row cannot be counted; use `prefix={window}` or less"
            )
        ends = [""] * (self.tied or self.prefix > 0)
        ends += [LAST] * (not self.tied and self.suffix > 0)
        return {f"{name}{end}": param for end in ends for name, param in own.items()}

    @property
    def watches(self) -> bool:
        return True

    def transform(self, t: Unit, x: Tensor) -> Tensor:
        assert isinstance(t, InterventionUnit)
        first, last = t.chosen()
        if self.tied:
            return self._at(t, x, first | last, "")
        if not self.suffix:
            return self._at(t, x, first, "")
        change = self._at(t, x, last, LAST)
        return change + self._at(t, x, first & ~last, "") if self.prefix else change

    def _at(self, t: Unit, x: Tensor, chosen: Tensor, end: str) -> Tensor:
        change = self.change(t, x, end)
        if self.dropout and t.training:
            change = F.dropout(x + change, self.dropout) - x
        return torch.where(chosen, change, 0.0)
