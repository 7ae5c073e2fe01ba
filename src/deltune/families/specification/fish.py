"""FISH Mask: the entries with the largest Fisher information."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from deltune.errors import AttachError, SpecError
from deltune.families.specification.sparse import Sparse
from deltune.mechanisms.learning import Losses
from deltune.mechanisms.select import backbone
from deltune.mechanisms.sparse import SparseSelect, choose, is_chosen, require_chosen
from deltune.mechanisms.unit import Mechanism, Unit
from deltune.sites.discover import Atlas
from deltune.sites.where import Where
from deltune.spec import Family, Paper, register, require


@register
@dataclass(frozen=True)
class FISH(SparseSelect):
    """The k entries of the backbone that matter most for the task, chosen once, before training.

        p' = p + s * scatter(i, v),    v (k) trained, zero at first
        i = the k largest of F_j = sum over S = `examples` examples of (d loss / d p_j)^2

    over all parameters together, with the true labels, one example at a time, dropout off; equal
    ones in model order. The task head is trained whole and counts: k = int(`density` * N) - N_head,
    N the entries of backbone and head (also where `attach(head=False)` leaves the head frozen).
    Trainable: k. Merges exactly.

    Training looks at the examples first. A mask stays once it is chosen: training the delta again
    goes on with it. `delta.fold()` turns it into plain `sparse`, which trains in any loop.

    Source: Sung, Nair and Raffel, "Training Neural Networks with Fixed Sparse Masks", 2021,
    arXiv:2111.09839.
    Differs: what is not chosen has no tensor, so weight decay and momentum cannot move it either.
    The released options to weight all labels by their probability, and to take absolute values
    instead of squares, are left out: a loss is all that training gives a method to look at.
    """

    kind: ClassVar[str] = "fish"
    family: ClassVar[Family] = "specification"
    paper: ClassVar[Paper | None] = Paper(
        "Sung et al.", "Training Neural Networks with Fixed Sparse Masks", 2021, "2111.09839"
    )

    density: float | None = None
    """Share of all parameters, the head's too; 0.005 if neither this nor `count` is given."""
    count: int | None = None
    """Number of entries k, instead of `density`."""
    examples: int = 1024
    """Training examples S that are looked at; all, if there are fewer."""
    where: Where = ""
    """The modules whose parameters are chosen from; all of the backbone by default."""

    def __post_init__(self) -> None:
        require(self.density is None or 0.0 < self.density <= 1.0, self, "density", "in (0, 1]")
        require(self.count is None or self.count >= 1, self, "count", "1 or more")
        require(self.count is None or self.density is None, self, "density",
                "left out where `count` is given")  # fmt: skip
        require(self.examples >= 1, self, "examples", "1 or more")

    def chosen(self, atlas: Atlas) -> list[tuple[str, str]]:
        return backbone(atlas, self.where, self.within)

    def kept(self, total: int, atlas: Atlas) -> int:
        if self.count is not None:
            return self.count
        head = {
            id(p): p.numel()
            for path, module in atlas.modules.items()
            if atlas.in_head(path)
            for p in module._parameters.values()
            if p is not None
        }
        entries = sum(head.values())
        asked = int((self.density or 0.005) * (total + entries))
        if asked <= entries:
            raise SpecError(
                f"`{self}` is a budget of {asked:,} entries, and the task head alone has "
                f"{entries:,}; raise `density`, or give `count`, which is for the backbone alone"
            )
        return asked - entries

    @property
    def demands(self) -> bool:
        return True

    def prepare(self, units: Sequence[Unit], losses: Losses) -> None:
        if not is_chosen(units):
            choose(units, losses(self.examples, size=1, training=False))

    def before_step(self, units: Sequence[Unit], step: int, steps: int, seed: int) -> None:
        require_chosen(units)

    def fold(self, units: Mapping[str, Unit]) -> tuple[Mechanism, dict[str, Tensor]] | None:
        if not is_chosen(units.values()):
            raise AttachError("`fish` has chosen no entries yet, so nothing folds; train it first")
        shared = next(iter(units.values())).shared
        plain = Sparse(count=len(shared.index), where=self.where, within=self.within)
        return plain, {"shared:all.values": shared.values, "shared:all.index": shared.index}
