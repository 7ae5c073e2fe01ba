"""The adapter of LiST: a bottleneck without nonlinearity or biases."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from deltune.mechanisms.factors import LowRank, one_rank
from deltune.mechanisms.insert import Insert, needs_width
from deltune.mechanisms.modules import matched
from deltune.mechanisms.tensors import Param, normal
from deltune.mechanisms.terms import Held, Terms
from deltune.mechanisms.unit import Unit
from deltune.sites.discover import Atlas
from deltune.sites.matrices import reader
from deltune.sites.site import Site
from deltune.sites.where import Where
from deltune.spec import Family, Paper, register, require


@register
@dataclass(frozen=True)
class LiST(Insert):
    """A linear bottleneck directly behind the last linear map of each sub-layer.

        h <- h + U D h,    h = W g + b,    D (m, d), U (d, m)

    before dropout, residual addition and norm. Both start from N(0, 0.0002^2).
    Trainable: 2 d m for each sub-layer; RoBERTa-base: 4,718,592. Merges exactly, being linear:
    W <- (I + U D) W and b <- (I + U D) b.

    Source: Wang et al., "LiST: Lite Prompted Self-training Makes Parameter-Efficient Few-shot
    Learners", 2021, arXiv:2110.06274.
    Differs: the adapter alone, without prompts, teacher and self-training; the authors train the
    head of the language model with it. A part that no single linear map ends, such as a mixture of
    experts, is changed at its output, and does not merge.
    """

    kind: ClassVar[str] = "list"
    family: ClassVar[Family] = "addition"
    merges: ClassVar[bool] = True
    paper: ClassVar[Paper | None] = Paper(
        "Wang et al.",
        "LiST: Lite Prompted Self-training Makes Parameter-Efficient Few-shot Learners", 2021,
        "2110.06274",
    )  # fmt: skip

    width: int = 128
    """Bottleneck m."""
    where: Where = "attn, ffn"
    """The sub-layers."""

    def __post_init__(self) -> None:
        require(self.width >= 1, self, "width", "1 or more")

    def sites(self, atlas: Atlas) -> list[Site]:
        return [
            site._replace(exit=site.last)
            if site.last and reader(site.last, atlas.modules) == site.last
            else site
            for site in super().sites(atlas)
        ]

    def tensors(self, site: Site, atlas: Atlas) -> dict[str, Param]:
        d, start = needs_width(site, self.kind), normal(2e-4)
        return {"D": Param((self.width, d), start), "U": Param((d, self.width), start)}

    def transform(self, t: Unit, x: Tensor) -> Tensor:
        down, up = matched(x, t.D, t.U)
        return F.linear(F.linear(x, down), up)

    def factors(self, t: Unit) -> LowRank:
        return LowRank(t.D, t.U, 1.0)

    def hold(self, terms: Terms, units: Mapping[str, Unit]) -> Held:
        width, factors = one_rank(terms)
        found = {f"{key}.D": one.down for key, one in factors.items()}
        found |= {f"{key}.U": one.up * one.scale for key, one in factors.items()}
        return Held(replace(self, width=width), found)

    def fused(self, t: Unit, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return t.U @ (t.D @ weight), None if bias is None else t.U @ (t.D @ bias)
