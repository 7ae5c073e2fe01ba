"""Split: each token of a row has its own delta."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltune.errors import AttachError
from deltune.mechanisms.masks import counted
from deltune.mechanisms.mix import Mix, MixUnit
from deltune.mechanisms.step import Step
from deltune.mechanisms.unit import Unit
from deltune.sites.discover import Atlas
from deltune.spec import register, require


class SplitUnit(MixUnit):
    """A mixer that counts tokens."""

    def note_mask(
        self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        self.noted[:] = [self.mine(counted(attention, given, given[self.names[0]].shape[1]))]


@register
@dataclass(frozen=True)
class Split(Mix):
    """Several deltas, each on the tokens between two positions of every row.

        h_t <- h_t + f_i(h_t),    at[i-1] <= t < at[i]

    t counts the real tokens of a row from 0 on, padding aside, also behind a key/value cache; rows
    of a joined prompt count as tokens. `split(a, b, at=5)` is a on the first five and b on the
    others. A change of weights acts on a token where the map reads that token. In a model of two
    stacks each counts its own. Rows of a batch are given deltas by `deltune.route`.

    It does not merge. What has no effect of each token (biases and other parameters as they are,
    prefixes, prompts) is refused, as are the maps in cross-attention that read the other stack.

    Example:
        >>> import deltune as dt
        >>> str(dt.parse("split(lora, adapter >> ia3, at=5)"))
        'split(lora, adapter >> ia3, at=5)'
    """

    kind: ClassVar[str] = "split"
    least: ClassVar[int] = 2
    unit: ClassVar[type[Unit]] = SplitUnit

    at: int | tuple[int, ...] = 1
    """The position from which on the second part acts; rising positions for more than two parts."""

    def __post_init__(self) -> None:
        super().__post_init__()
        ends = self.ends
        rising = all(a < b for a, b in zip((0, *ends), ends, strict=False))
        n = len(self.parts) - 1
        require(len(ends) == n and rising, self, "at", f"{n} rising positions from 1 on")

    @property
    def ends(self) -> tuple[int, ...]:
        """The positions between the parts."""
        return (self.at,) if isinstance(self.at, int) else self.at

    @property
    def watches(self) -> bool:
        return True

    def check(self, step: Step, atlas: Atlas) -> None:
        site = step.site
        if site.stack == "cross" and site.role in ("attn.k", "attn.v"):
            raise AttachError(
                f"`{self.kind}` counts the tokens of one stack, and `{site.path}` reads those of "
                "the other; leave `cross.attn.k` and `cross.attn.v` out of `where`"
            )

    def mix(
        self, t: MixUnit, module: nn.Module, h: Tensor, changes: Sequence[Tensor | None]
    ) -> Tensor:
        numbers = t.noted.pop() if t.noted else None
        if numbers is None or h.ndim != 3 or numbers.shape[1] != h.shape[1]:
            raise AttachError(
                f"`{self.kind}` needs the tokens of each row at `{t.site.path}`, and what comes "
                f"there is {tuple(h.shape)}, or came before the attention of its block was called; "
                "choose other places"
            )
        bounds = torch.tensor(self.ends, device=numbers.device)
        part = torch.bucketize(numbers.contiguous(), bounds, right=True)[..., None]
        mixed = torch.zeros_like(h)
        for n, change in enumerate(changes):
            if change is not None:
                mixed = torch.where(part == n, change, mixed)
        return mixed
