"""AdaLoRA: low-rank adaptation whose rank is spent where it matters."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from deltune.families.reparameterization.lora import LoRA
from deltune.mechanisms import importance
from deltune.mechanisms.binary import cubic
from deltune.mechanisms.factors import LowRank
from deltune.mechanisms.tensors import Param, normal, zeros
from deltune.mechanisms.unit import Unit
from deltune.mechanisms.weight import Weight, check_rank
from deltune.sites.discover import Atlas
from deltune.sites.site import Site
from deltune.sites.where import Where
from deltune.spec import Family, Paper, register, require


@register
@dataclass(frozen=True)
class AdaLoRA(Weight):
    """Low-rank adaptation in the form of a singular value decomposition, whose least important
    triplets are taken away in training, over all matrices alike.

        y = x W^T + b + s * drop(x) A^T diag(E) B^T,    s = alpha / (r + 1e-5)

    with A (r, in), B (out, r) and E (r) trained; E = 0 at first, so the model starts unchanged.
    `orthogonality` times the mean of ||A A^T - I|| and ||B^T B - I|| joins the loss. An entry w has
    the importance U(w) V(w), U <- beta1 U + (1 - beta1) |w dL/dw| and
    V <- beta2 V + (1 - beta2) ||w dL/dw| - U|, a triplet that of its E and the means over A's row
    and B's column. Every `interval` steps, and in each of the last ones, E is set to 0 but for the
    b(t) most important triplets of all n matrices,

        b(t) = n target + n (r - target) (1 - (t - a T) / (T - a T - c T))^3

    in T steps, with a = `warmup` of them before and c = `cooldown` after. U and V are kept with the
    delta, so that training resumes; `delta.fold()` gives a LoRA without. Trainable: the sum over
    matrices of r (in + out + 1). Merges exactly.

    Source: Zhang et al., "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning",
    2023, arXiv:2303.10512, eq. 3, 4 and 7 to 11.
    Differs: s is PEFT's. The importance is that before the step, in PEFT after it. No evaluation
    before the last budget counts as the best.
    """

    kind: ClassVar[str] = "adalora"
    family: ClassVar[Family] = "reparameterization"
    paper: ClassVar[Paper | None] = Paper(
        "Zhang et al.", "AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning",
        2023, "2303.10512",
    )  # fmt: skip
    checked: ClassVar[str] = "PEFT 0.21.2: equal outputs, penalty and choice of triplets"

    rank: int = 12
    """Rank r of each matrix at first."""
    target: int = 8
    """Rank of each matrix at last, on average."""
    alpha: float = 8.0
    """Numerator of the scale s."""
    dropout: float = 0.0
    """Dropout on the input of A, in training."""
    orthogonality: float = 0.5
    """Factor of the penalty."""
    beta1: float = 0.85
    """Decay of the mean importance."""
    beta2: float = 0.85
    """Decay of its mean deviation."""
    warmup: float = 0.1
    """Share of the steps before the budget falls."""
    cooldown: float = 0.3
    """Share of the steps after it has fallen."""
    interval: int = 1
    """Steps from one choice to the next, while it falls."""
    where: Where = "attn.q, attn.v"
    """The matrices to adapt."""

    def __post_init__(self) -> None:
        require(self.rank >= 1, self, "rank", "1 or more")
        require(1 <= self.target <= self.rank, self, "target", "from 1 to `rank`")
        require(0.0 <= self.dropout < 1.0, self, "dropout", "in [0, 1)")
        require(self.orthogonality >= 0.0, self, "orthogonality", "0 or more")
        require(0.0 < self.beta1 < 1.0, self, "beta1", "between 0 and 1")
        require(0.0 < self.beta2 < 1.0, self, "beta2", "between 0 and 1")
        require(0.0 <= self.warmup < 1.0, self, "warmup", "in [0, 1)")
        require(0.0 <= self.cooldown < 1 - self.warmup, self, "cooldown", "in [0, 1 - `warmup`)")
        require(self.interval >= 1, self, "interval", "1 or more")

    @property
    def demands(self) -> bool:
        return True

    def tensors(self, site: Site, atlas: Atlas) -> dict[str, Param]:
        (*experts, out, into), r = site.shape, self.rank
        check_rank(self, site, r)
        found = {
            "A": Param((*experts, r, into), normal(0.02)),
            "B": Param((*experts, out, r), normal(0.02)),
            "E": Param((*experts, r), zeros),
        }
        return found | importance.kept(found)

    def update(self, t: Unit) -> LowRank:
        return LowRank(t.A, t.B * t.E[..., None, :], self.alpha / (self.rank + 1e-5), self.dropout)

    def penalty(self, units: Sequence[Unit]) -> Tensor | None:
        squares = [square for t in units for square in (t.A @ t.A.mT, t.B.mT @ t.B)]
        one = torch.eye(self.rank, dtype=squares[0].dtype, device=squares[0].device)
        norms = [torch.linalg.matrix_norm(square - one).mean() for square in squares]
        return self.orthogonality * torch.stack(norms).mean()

    def before_step(self, units: Sequence[Unit], step: int, steps: int, seed: int) -> None:
        for t in units:
            t.__dict__["followed"] = step + 1 < steps - self.cooldown * steps

    def after_backward(self, units: Sequence[Unit], seed: int) -> None:
        importance.follow([t for t in units if t.followed], self.beta1, self.beta2)

    def after_step(self, units: Sequence[Unit], step: int, steps: int) -> None:
        now, begin, end = step + 1, self.warmup * steps, steps - self.cooldown * steps
        if now > begin and (now >= end or now % self.interval == 0):
            matrices = importance.count(units)[1] // self.rank
            more = int((self.rank - self.target) * matrices * cubic(now, begin, end))
            importance.choose(units, self.target * matrices + more)

    def settled(self, units: Sequence[Unit]) -> bool:
        stay, every = importance.count(units)
        return stay * self.rank == every * self.target

    def note(self, units: Sequence[Unit], model: nn.Module) -> str:
        return "{} of {} triplets stay".format(*importance.count(units))

    def fold(self, units: Mapping[str, Unit]) -> tuple[LoRA, dict[str, Tensor]]:
        found = {f"{key}.A": t.A for key, t in units.items()}
        found |= {f"{key}.B": t.B * t.E[..., None, :] for key, t in units.items()}
        alpha = self.alpha * self.rank / (self.rank + 1e-5)
        plain = LoRA(rank=self.rank, alpha=alpha, dropout=self.dropout, where=self.where)
        return replace(plain, within=self.within), found
