"""Changes of matrices by a pair A (r, in) and B (out, r): how the pair starts and is trained."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from deltune.errors import AttachError
from deltune.mechanisms import starts
from deltune.mechanisms.factors import LowRank, one_rank
from deltune.mechanisms.tensors import Param, zeros
from deltune.mechanisms.terms import Held, Terms
from deltune.mechanisms.unit import Losses, Mechanism, Rate, Unit
from deltune.mechanisms.weight import Weight, check_rank
from deltune.sites.discover import Atlas
from deltune.sites.site import Site
from deltune.spec import require


@dataclass(frozen=True)
class Paired(Weight):
    """A method whose change is s (B A - B0 A0), B0 A0 where the pair starts: define `tensors` with
    `start`, and `update` with `starts.moved`."""

    init: starts.Start = field(default="zero", kw_only=True)
    """Where A and B start: `zero` (their product), `pissa`, `olora`, `eva`, `corda` or
    `corda_kpm`."""
    examples: int = field(default=256, kw_only=True)
    """Training examples that `eva` and `corda` look at; all, if there are fewer."""
    frozen: bool = field(default=False, kw_only=True)
    """Whether A is kept as it starts (LoRA-FA)."""
    rate: float = field(default=1.0, kw_only=True)
    """Learning rate of B over that of A (LoRA+)."""

    def __post_init__(self) -> None:
        require(self.examples >= 1, self, "examples", "1 or more")
        require(self.rate > 0.0, self, "rate", "above 0")

    def start(
        self, pair: dict[str, Param], site: Site, atlas: Atlas, scale: float
    ) -> dict[str, Param]:
        """The tensors at a site, from those of a pair whose product starts at zero.

        Args:
            pair: A and B.
            site: the place.
            atlas: of the model.
            scale: s there.

        Raises:
            AttachError: A would be kept at 0.
        """
        made = starts.declared(self.init, pair, site, atlas, scale)
        if self.frozen and made["A"].init is zeros:
            raise AttachError(
                f"`{self}`: A starts at 0 at `{site.path}`, so that nothing would ever change with "
                "it frozen; leave the embedding out, or use `init='pissa'`"
            )
        return made | {"A": made["A"]._replace(trained=not self.frozen)}

    def update(self, t: Unit) -> LowRank:
        """The change of the matrix of the unit `t`, from its tensors."""
        raise NotImplementedError

    scaled: ClassVar[tuple[str, ...]] = ("B", "B0")

    def scale_at(self, rank: int) -> float:
        """s of a pair of this rank."""
        raise NotImplementedError

    def of_scale(self, rank: int | Mapping[str, int], scale: float, of: int) -> Self:
        """The method with pairs of other ranks that start at zero, s being `scale` at rank `of`."""
        raise NotImplementedError

    def strength(self, tensors: Mapping[str, Tensor]) -> float:
        return self.scale_at(tensors["A"].shape[-2])

    def hold(self, terms: Terms, units: Mapping[str, Unit]) -> Held:
        """Pairs as they are, all of one rank, at the scale that the method has."""
        rank, factors = one_rank(terms)
        plain: Any = replace(self, frozen=False, **({"gate": False} if self.gated else {}))
        spread = plain.over(plain.meant)
        s = spread.scale_at(spread.rank) or 1.0
        found = {f"{key}.A": one.down for key, one in factors.items()}
        found |= {f"{key}.B": one.up * (one.scale / s) for key, one in factors.items()}
        return Held(spread.of_scale(rank, s, rank), found)

    def fold(self, units: Mapping[str, Unit]) -> tuple[Mechanism, dict[str, Tensor]] | None:
        if self.init == "zero":
            return None
        times = 1 if self.init == "eva" else 2
        ranks: Any = getattr(self, "rank")  # noqa: B009
        wide = {w: times * r for w, r in ranks.items()} if isinstance(ranks, Mapping) else None
        for t in units.values():
            check_rank(self, t.site, times * t.A.shape[-2])
        folded = self.of_scale(wide or times * ranks, self.scale_at(1), times)
        return folded, self.plain(units)

    @property
    def demands(self) -> bool:
        return self.init in starts.LOOKING

    def rates(self) -> Mapping[str, Rate]:
        return {"B": Rate(self.rate)} if self.rate != 1.0 else {}

    def prepare(self, units: Sequence[Unit], losses: Losses) -> None:
        if self.demands:
            shown = losses(self.examples, size=1, training=False)
            starts.look(units, shown, self.init, lambda t: self.update(t).scale)

    def before_step(self, units: Sequence[Unit], step: int, steps: int, seed: int) -> None:
        if self.demands:
            starts.require_looked(units)

    def nearest(self, t: Unit, change: Tensor) -> None:
        """A truncated SVD (Eckart and Young), its singular values shared by A and B; with a frozen
        A the least squares."""
        scale, wide = self.update(t).scale * t.scale, change.double()
        if self.gated or not scale:
            super().nearest(t, change)
        if "A0" in t._buffers:
            wide = wide + scale * (t.B0.double() @ t.A0.double())
        if self.frozen:
            t.B.copy_(wide @ torch.linalg.pinv(t.A.double()) / scale)
            return
        for own, value in zip("AB", starts.principal(wide, t.A.shape[-2], scale), strict=True):
            t.own(own).copy_(value)

    def plain(self, units: Mapping[str, Unit]) -> dict[str, Tensor]:
        """The tensors of units as those of pairs that start at zero and do the same."""
        found: dict[str, Tensor] = {}
        for key, t in units.items():
            A, B = starts.moved(t)
            own = {**t._parameters, **t._buffers, "A": A, "B": B}
            left = {n: v for n, v in own.items() if v is not None and n not in starts.KEPT}
            found |= {f"{key}.{name}": value for name, value in left.items()}
        return found
