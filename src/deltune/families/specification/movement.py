"""Movement pruning: matrices are tuned, and what moves towards zero is pruned."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar, Literal

import torch
from torch import Tensor

from deltune.families.specification.pruned import Pruned, remains
from deltune.mechanisms.binary import Masked, budget, cubic, straight, targets, top
from deltune.mechanisms.learning import Rate
from deltune.mechanisms.tensors import Param, constant
from deltune.mechanisms.unit import Unit
from deltune.sites.discover import Atlas
from deltune.sites.site import Site
from deltune.spec import Family, Paper, register, require


@register
@dataclass(frozen=True)
class Movement(Masked):
    """Prunes matrices by learned scores while their weights are fine-tuned.

        W' = W + s (M (.) (W + D) - W),    M = M(S)
        dL/dS = dL/dW' (.) (W + D) for every entry,    dL/dD = dL/dW' (.) M

    D and S (`<parameter>:scores`) have the shape of W and are zero at first. Hard: M keeps the
    int(v n) largest of the n scores of a matrix, v from 1 to `keep`. Soft: M = 1[sigmoid(S) > v],
    v from 0 to `threshold`, at least int(0.005 n) + 1 ones; `l1` v / `threshold` times the mean of
    sigmoid(S), over all matrices alike, joins the loss. v goes from its first to its last value as

        v(t) = v_T + (v_0 - v_T) (1 - (t - a T) / (T - a T - b T))^3

    in T steps, staying at v_0, the dense model, for a = `warmup` of them and at v_T for the last
    b = `cooldown`. Where it has come to is kept (`<parameter>:level`: int(v n) or v).
    Trainable: 2 n for each matrix. `delta.fold()` gives a `pruned` of what is left. Merges exactly.

    Source: Sanh et al., "Movement Pruning: Adaptive Sparsity by Fine-Tuning", 2020,
    arXiv:2005.07683.
    Differs: of equal scores the first are kept, in soft pruning too; the released code keeps none
    if all are equal. Only the pruned matrices are tuned: add `bitfit` for biases. An evaluation
    sees the mask of its step, in the code that of v_T; none before v_T counts as the best. The
    learning rate of S is a factor, and follows the schedule; under Adam, whose steps do not know
    the size of a gradient, it changes no hard mask. Distillation and the variants by
    magnitude and with L0 are left out.
    """

    kind: ClassVar[str] = "movement"
    family: ClassVar[Family] = "specification"
    paper: ClassVar[Paper | None] = Pruned.paper

    mode: Literal["hard", "soft"] = "hard"
    """Whether the number of weights is set, or a threshold of their scores."""
    keep: float = 0.15
    """Hard: share of each matrix that is left at last."""
    threshold: float = 0.1
    """Soft: threshold at last."""
    l1: float = 400.0
    """Soft: factor of the penalty at last."""
    warmup: float = 0.1
    """Share of the steps before pruning begins."""
    cooldown: float = 0.2
    """Share of the steps after it has ended."""
    rate: float = 1e-2 / 3e-5
    """Learning rate of the scores over that of the weights."""

    def __post_init__(self) -> None:
        require(0.0 < self.keep <= 1.0, self, "keep", "in (0, 1]")
        require(0.0 < self.threshold < 1.0, self, "threshold", "in (0, 1)")
        require(self.l1 >= 0.0, self, "l1", "0 or more")
        require(0.0 <= self.warmup < 1.0, self, "warmup", "in [0, 1)")
        require(0.0 <= self.cooldown < 1 - self.warmup, self, "cooldown", "in [0, 1 - `warmup`)")
        require(self.rate > 0.0, self, "rate", "above 0")

    @property
    def demands(self) -> bool:
        return True

    def rates(self) -> Mapping[str, Rate]:
        return {"*:scores": Rate(self.rate, decayed=False)}

    def level(self, step: int, steps: int, size: int) -> float:
        """int(v n), or v in soft pruning, in step `step` of `steps`; n = `size`."""
        left = cubic(step, self.warmup * steps, steps - self.cooldown * steps)
        if self.mode == "soft":
            return self.threshold * (1 - left)
        return int((left + self.keep * (1 - left)) * size)

    def tensors(self, site: Site, atlas: Atlas) -> dict[str, Param]:
        found: dict[str, Param] = {}
        dtype = torch.int64 if self.mode == "hard" else torch.float32
        for name, param in super().tensors(site, atlas).items():
            size = prod(param.shape)
            budget(self, "keep", size, f"`{site.path}.{name}`")
            first = constant(self.level(0, 1, size))
            state = Param((), first, trained=False, dtype=dtype)
            found |= {name: param, f"{name}:scores": param, f"{name}:level": state}
        return found

    def mask(self, t: Unit, name: str, shape: Sequence[int]) -> Tensor:
        scores = t.own(f"{name}:scores").detach()
        if self.mode == "hard":
            return top(scores, t.state(f"{name}:level"))
        least = top(scores, int(0.005 * scores.numel()) + 1)
        return (scores.sigmoid() > getattr(t, f"{name}:level")) | least

    def left(self, t: Unit, name: str, shape: Sequence[int]) -> int:
        hard = self.mode == "hard"  # known without a search for the largest scores
        return int(t.state(f"{name}:level")) if hard else super().left(t, name, shape)

    def difference(self, t: Unit, name: str, value: Tensor) -> Tensor:
        mask = self.mask(t, name, value.shape)
        return straight(t.own(f"{name}:scores"), mask, value, t.own(name))

    def before_step(self, units: Sequence[Unit], step: int, steps: int, seed: int) -> None:
        for unit, name in targets(units):
            unit.become(f"{name}:level", self.level(step, steps, unit.own(name).numel()))

    def after_step(self, units: Sequence[Unit], step: int, steps: int) -> None:
        self.before_step(units, step + 1, steps, 0)

    def penalty(self, units: Sequence[Unit]) -> Tensor | None:
        if self.mode == "hard":
            return None
        means = [t.own(f"{name}:scores").sigmoid().mean() for t, name in targets(units)]
        t, name = next(targets(units))
        v = t.state(f"{name}:level")
        return self.l1 * v / self.threshold * torch.stack(means).mean()

    def settled(self, units: Sequence[Unit]) -> bool:
        return all(
            abs(t.state(f"{name}:level") - self.level(1, 1, t.own(name).numel())) < 1e-6
            for t, name in targets(units)
        )

    def fold(self, units: Mapping[str, Unit]) -> tuple[Pruned, dict[str, Tensor]]:
        return remains(self, units)
