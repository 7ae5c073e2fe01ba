"""Masking: a learned choice of which pre-trained weights stay."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log
from typing import ClassVar, Literal

import torch
from torch import Tensor

from deltune.families.specification.mask import Mask
from deltune.mechanisms import concrete
from deltune.mechanisms.binary import Masked, pack, straight, targets
from deltune.mechanisms.tensors import Param, constant, uniform
from deltune.mechanisms.unit import Unit
from deltune.sites.discover import Atlas
from deltune.sites.site import Site
from deltune.spec import register, require


@register
@dataclass(frozen=True)
class Masking(Mask):
    """Learns which pre-trained weights stay; the others act as zero.

        W' = W + s (M (.) W - W),    M = 1[m > tau]    dL/dm = dL/dW' (.) W for every entry

    m (`<parameter>:scores`, of the shape of W) starts from U(-a, (a + tau) / `sparsity` - a), so
    that a share `sparsity` of the weights is off at first: the start is not the identity.
    `mode="sign"` has tau = 0 and no gradient where |m| >= 1. `mode="bernoulli"` has
    M ~ Bernoulli(sigmoid(m)), drawn once for each step of training and 1[m > 0] outside of it;
    m starts at log((1 - `sparsity`) / `sparsity`).

    Trainable: one score for each weight, 71,368,704 in BERT-base (10 (4 d^2 + 2 d f) + d^2).
    `delta.fold()` gives a `mask` of one bit for each. Merges exactly.

    Source: Zhao et al., "Masking as an Efficient Alternative to Finetuning for Pretrained Language
    Models", 2020, arXiv:2004.12406.
    Differs: the task head trains as with any delta; the released code masks a random one
    (`dt.attach(..., head=False)` and a `where` with `head`). Scores of `sign` are not clamped to
    [-1, 1]. The code draws from Bernoulli in evaluation too. Masks of biases, of whole heads and
    of layers, and the term that steers the sparsity, are left out.
    """

    kind: ClassVar[str] = "masking"

    mode: Literal["threshold", "sign", "bernoulli"] = "threshold"
    """How M follows from m."""
    sparsity: float = 0.05
    """Share of the weights that are off at first."""
    threshold: float = 1e-2
    """tau."""
    spread: float = 2e-2
    """a, minus the lowest score at first."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0.0 < self.sparsity < 1.0, self, "sparsity", "in (0, 1)")
        require(self.spread > 0.0, self, "spread", "above 0")
        require(self.threshold > -self.spread, self, "threshold", "above -`spread`")

    @property
    def demands(self) -> bool:
        return self.mode == "bernoulli"

    @property
    def _tau(self) -> float:
        return self.threshold if self.mode == "threshold" else 0.0

    def tensors(self, site: Site, atlas: Atlas) -> dict[str, Param]:
        start = uniform(-self.spread, (self.spread + self._tau) / self.sparsity - self.spread)
        if self.mode == "bernoulli":
            start = constant(log((1 - self.sparsity) / self.sparsity))
        return {
            f"{name}:scores": Param(param.shape, start)
            for name, param in Masked.tensors(self, site, atlas).items()
        }

    def mask(self, t: Unit, name: str, shape: Sequence[int]) -> Tensor:
        scores = t.own(f"{name}:scores").detach()
        u = concrete.drawn(t, f"{name}:scores")
        return scores > self._tau if u is None else u < scores.sigmoid()

    def difference(self, t: Unit, name: str, value: Tensor) -> Tensor:
        scores = t.own(f"{name}:scores")
        if self.mode == "sign":
            scores = torch.where(scores.abs() < 1, scores, scores.detach())
        return straight(scores, self.mask(t, name, value.shape), value)

    def before_step(self, units: Sequence[Unit], step: int, steps: int, seed: int) -> None:
        concrete.draw(units, seed, (":scores",))

    def after_step(self, units: Sequence[Unit], step: int, steps: int) -> None:
        concrete.forget(units)

    def fold(self, units: Mapping[str, Unit]) -> tuple[Mask, dict[str, Tensor]]:
        bits = {
            f"{place}.{name}:bits".lstrip("."): pack(self.mask(unit, name, ()))
            for place, unit in units.items()
            for _, name in targets([unit])
        }
        return Mask(self.where, self.skip, within=self.within), bits
