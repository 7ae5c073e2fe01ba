"""Child-Tuning: only a part of the network gets gradients."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from deltune.errors import WhereError
from deltune.mechanisms.learning import Losses
from deltune.mechanisms.select import backbone
from deltune.mechanisms.sparse import SparseSelect, choose, is_chosen, require_chosen
from deltune.mechanisms.unit import Unit
from deltune.sites.discover import Atlas
from deltune.sites.site import Site
from deltune.spec import Family, Paper, register, require


@register
@dataclass(frozen=True)
class Child(SparseSelect):
    """Fine-tuning in which a child network of the backbone is updated.

        p' = p + s * d,    d trained, zero at first

    F (task-free): d has the shape of p, and in each step every entry of its gradient g becomes
    g b / `share` with b ~ Bernoulli(`share`) drawn anew, unbiased and with variance
    g^2 (1 - share) / share. Entries move also where b = 0, by the optimiser's momentum.
    D (task-driven): of all N entries of the blocks together only those are trained that have the
    largest sum of squared gradients over the batches of the training data, with dropout on and
    each batch's gradient to each tensor clipped to norm `clip`; chosen once, before training.
    Embeddings, pooler and other parameters outside the blocks are trained whole.

    Trainable: F all entries; D N - ceil((1 - share)(N - 1)) of the blocks (as many as reach the
    (1 - share) quantile), the rest whole. Merges exactly. A mask stays once it is chosen: training
    the delta again goes on with it.

    Source: Xu et al., "Raise a Child in Large Language Model: Towards Effective and Generalizable
    Fine-tuning", 2021, arXiv:2109.05687.
    Differs: what D leaves out has no tensor, so it stays bit for bit; the released code lets weight
    decay move it. Weight decay draws d to zero, not p; the entries that D selects are one vector,
    and vectors are not decayed by `deltune.train`. Equal sums are taken in model order up to
    the exact number; the released code takes all of them. "Blocks" are the model's own, where the
    code asks for `layer` in a name. F leaves the task head's gradient whole. Clipping of the joint
    gradient comes behind the mask in `deltune.train`, before it in the released code and `Trainer`.
    """

    kind: ClassVar[str] = "child"
    family: ClassVar[Family] = "specification"
    paper: ClassVar[Paper | None] = Paper(
        "Xu et al.",
        "Raise a Child in Large Language Model: Towards Effective and Generalizable Fine-tuning",
        2021, "2109.05687",
    )  # fmt: skip

    mode: Literal["F", "D"] = "F"
    """Another child in each step (F), or one chosen from the data (D)."""
    share: float = 0.3
    """Share of the entries that are in the child network."""
    clip: float = 1.0
    """D: norm to which each gradient is clipped before it is squared; 0 leaves it."""

    def __post_init__(self) -> None:
        require(0.0 < self.share <= 1.0, self, "share", "in (0, 1]")
        require(self.clip >= 0.0, self, "clip", "0 or more")

    def chosen(self, atlas: Atlas) -> list[tuple[str, str]]:
        if self.mode == "D" and not _blocks(atlas):
            raise WhereError(
                f"`child(mode='D')`: {type(atlas.model).__name__} has no blocks to choose from; "
                "use `child(mode='F')` or `fish`"
            )
        return backbone(atlas, within=self.within)

    def masked(self, site: Site, atlas: Atlas) -> bool:
        return self.mode == "D" and f"{site.path}.".startswith(_blocks(atlas))

    def kept(self, total: int, atlas: Atlas) -> int:
        return total - math.ceil((1 - self.share) * (total - 1))

    @property
    def demands(self) -> bool:
        return True

    def prepare(self, units: Sequence[Unit], losses: Losses) -> None:
        if self.mode == "D" and not is_chosen(units):
            choose(units, losses(sys.maxsize), self.clip)

    def before_step(self, units: Sequence[Unit], step: int, steps: int, seed: int) -> None:
        if self.mode == "D":
            require_chosen(units)

    def after_backward(self, units: Sequence[Unit], seed: int) -> None:
        generators: dict[torch.device, torch.Generator] = {}
        for unit in units if self.mode == "F" else ():
            for parameter in unit.parameters(recurse=False):
                if (g := parameter.grad) is None:
                    continue
                if g.device not in generators:
                    generators[g.device] = torch.Generator(g.device).manual_seed(seed)
                drawn = torch.empty_like(g).bernoulli_(self.share, generator=generators[g.device])
                g.mul_(drawn).div_(self.share)


def _blocks(atlas: Atlas) -> tuple[str, ...]:
    """The beginnings of the paths of everything in blocks."""
    return tuple(f"{site.path}." for site in atlas.sites if site.role == "block")
