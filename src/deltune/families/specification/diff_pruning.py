"""Diff pruning: a change of all parameters that is learned to be sparse."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import ClassVar

import torch
from torch import Tensor, nn

from deltune.errors import AttachError, TrainError
from deltune.families.specification.sparse import Sparse
from deltune.mechanisms import binary, concrete
from deltune.mechanisms.learning import Rate
from deltune.mechanisms.select import Select, backbone
from deltune.mechanisms.tensors import Param, constant, zeros
from deltune.mechanisms.unit import Unit
from deltune.sites.discover import Atlas
from deltune.sites.site import Site
from deltune.sites.where import Where
from deltune.spec import Family, Paper, register, require

LOW, HIGH, PRUNED = -1.5, 1.5, ":pruned"


@register
@dataclass(frozen=True)
class DiffPruning(Select):
    """Fine-tuning by a difference whose entries are gated, then pruned to an exact number.

        p' = p + s * z_g z (.) w
        z = clamp(sigmoid(log u - log(1 - u) + alpha) (r - l) + l, 0, 1),    l = -1.5, r = 1.5

    w and alpha (`<parameter>:alpha`) have the shape of p and start at 0 and `start`; u ~ U(0, 1) is
    drawn once for each step of training and is 1/2 outside of it. z_g, where `structured`, is such
    a gate for each tensor (`:group`). `l0` times the expected number of open gates, the sum of
    sigmoid(alpha - log(-l / r)), joins the loss. After the share `learn` of the steps the
    int(`density` N) largest of all N entries of |z_g z w| are kept, w takes their value, and from
    then on they alone move: p' = p + s M w, with M as packed bits (`:bits`), in later runs too.
    Trainable: 2 N and a gate for each tensor. `delta.fold()` gives a `sparse`. Merges exactly.

    Source: Guo et al., "Parameter-Efficient Transfer Learning with Diff Pruning", 2021,
    arXiv:2012.07463; gates of Louizos et al., "Learning Sparse Neural Networks through L0
    Regularization", 2018, arXiv:1712.01312.
    Differs: an exact number is kept, of equal entries the first; the released code bisects a
    threshold. Evaluation and pruning use the gates of u = 1/2, in the code those last drawn; no
    evaluation before pruning counts as the best. The head trains whole, outside N. One optimiser
    serves both stages, with joint clipping. The learning rate of alpha is a factor and follows the
    schedule; in the code it is constant, as with `lr_scheduler_type="constant"`.
    """

    kind: ClassVar[str] = "diff"
    family: ClassVar[Family] = "specification"
    paper: ClassVar[Paper | None] = Paper(
        "Guo et al.", "Parameter-Efficient Transfer Learning with Diff Pruning", 2021, "2012.07463"
    )
    unit: ClassVar[type[Unit]] = binary.StateUnit

    density: float = 0.005
    """Share of the entries that are changed at last."""
    learn: float = 0.5
    """Share of the steps before pruning."""
    l0: float = 1.25e-7
    """Factor of the penalty."""
    structured: bool = True
    """Whether each tensor has a gate of its own too."""
    rate: float = 0.1 / 5e-5
    """Learning rate of alpha over that of w."""
    start: float = 5.0
    """alpha at first."""
    where: Where = ""
    """The modules whose parameters change; all of the backbone by default."""

    def __post_init__(self) -> None:
        require(0.0 < self.density < 1.0, self, "density", "in (0, 1)")
        require(0.0 < self.learn < 1.0, self, "learn", "in (0, 1)")
        require(self.l0 >= 0.0, self, "l0", "0 or more")
        require(self.rate > 0.0, self, "rate", "above 0")

    @property
    def demands(self) -> bool:
        return True

    def rates(self) -> Mapping[str, Rate]:
        return {f"*{gate}": Rate(self.rate, decayed=False) for gate in concrete.ENDINGS}

    def chosen(self, atlas: Atlas) -> list[tuple[str, str]]:
        return backbone(atlas, self.where, self.within)

    def sites(self, atlas: Atlas) -> list[Site]:
        found = super().sites(atlas)
        whole = [p for site in found for p in Select.tensors(self, site, atlas).values()]
        binary.budget(self, "density", sum(prod(p.shape) for p in whole), "the backbone")
        return found

    def tensors(self, site: Site, atlas: Atlas) -> dict[str, Param]:
        found = {PRUNED: Param((), zeros, trained=False, dtype=torch.uint8)}
        for name, w in super().tensors(site, atlas).items():
            alpha, bits = constant(self.start), binary.bits_of(w.shape)
            found |= {name: w, f"{name}:alpha": Param(w.shape, alpha), f"{name}:bits": bits}
            if self.structured:
                found[f"{name}:group"] = Param((), alpha)
        return found

    def difference(self, t: Unit, name: str, value: Tensor) -> Tensor:
        gated = partial(concrete.gated, t, name, LOW, HIGH)
        return t.either(PRUNED, partial(binary.remaining, t, name), gated)

    def before_step(self, units: Sequence[Unit], step: int, steps: int, seed: int) -> None:
        if int(self.learn * steps) == 0:
            raise TrainError(f"`{self}` has no step to learn in, of {steps}; train for more steps")
        concrete.forget(units)
        if step >= int(self.learn * steps) and not self.settled(units):
            changes = [self.difference(t, name, t.own(name)) for t, name in binary.targets(units)]
            binary.prune(units, changes, int(self.density * sum(c.numel() for c in changes)))
            for t in units:
                t.become(PRUNED, 1)
        if not self.settled(units):
            concrete.draw(units, seed)

    def penalty(self, units: Sequence[Unit]) -> Tensor | None:
        return None if self.settled(units) else self.l0 * concrete.expected(units, LOW, HIGH)

    def after_step(self, units: Sequence[Unit], step: int, steps: int) -> None:
        concrete.forget(units)

    def settled(self, units: Sequence[Unit]) -> bool:
        return bool(units[0].state(PRUNED))

    def note(self, units: Sequence[Unit], model: nn.Module) -> str:
        left = f"{len(binary.gathered(units)[0]):,} entries left"
        return left if self.settled(units) else "not pruned yet"

    def fold(self, units: Mapping[str, Unit]) -> tuple[Sparse, dict[str, Tensor]]:
        if not self.settled([*units.values()]):
            raise AttachError(f"`{self}` cannot fold before it is pruned; train it to the end")
        values, index = binary.gathered([*units.values()])
        plain = Sparse(count=len(values), where=self.where, within=self.within)
        return plain, {"shared:all.values": values, "shared:all.index": index}
