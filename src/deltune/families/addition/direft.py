"""DiReFT: edits of hidden states by a product of two thin matrices."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from deltune.mechanisms.interventions import Intervention
from deltune.mechanisms.modules import matched
from deltune.mechanisms.tensors import Param, fan_in_uniform, kaiming
from deltune.mechanisms.unit import Unit
from deltune.sites.discover import Atlas
from deltune.sites.site import Site
from deltune.spec import Family, Paper, register


@register
@dataclass(frozen=True)
class DiReFT(Intervention):
    """Adds to the hidden states of some tokens what two thin matrices make of them.

        h_i <- h_i + R^T (W h_i + b)

    behind each block, for the first `prefix` and the last `suffix` real tokens i of each row, with
    R (r, d), W (r, d) and b (r) trained; the first and the last tokens have tensors of their own
    unless they are `tied`, and a token that is both has the last ones'. The model does not start
    unchanged. Trainable: 2 r d + r for each block and end. It does not merge.

    Source: Wu et al., "ReFT: Representation Finetuning for Language Models", 2024,
    arXiv:2404.03592, eq. 5.
    Differs: which tokens are meant is told at `loreft`, with what follows from it.
    """

    kind: ClassVar[str] = "direft"
    family: ClassVar[Family] = "addition"
    paper: ClassVar[Paper | None] = Paper(
        "Wu et al.", "ReFT: Representation Finetuning for Language Models", 2024, "2404.03592"
    )

    def tensors(self, site: Site, atlas: Atlas) -> dict[str, Param]:
        d, r = site.width, self.rank
        pair = {"R": Param((r, d), kaiming), "W": Param((r, d), kaiming)}
        return self.each(site, atlas, pair | {"b": Param((r,), fan_in_uniform(d))})

    def change(self, t: Unit, x: Tensor, end: str) -> Tensor:
        R, W, b = matched(x, *(t.own(f"{name}{end}") for name in "RWb"))
        return F.linear(x, W, b) @ R
