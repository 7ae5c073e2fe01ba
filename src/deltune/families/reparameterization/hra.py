"""HRA: a chain of Householder reflections before each chosen matrix."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from deltune.errors import SpecError
from deltune.mechanisms.rotation import features_last, turned_features
from deltune.mechanisms.tensors import Param, fan_in_uniform
from deltune.mechanisms.unit import Unit
from deltune.mechanisms.weight import Weight
from deltune.sites.discover import Atlas
from deltune.sites.site import Site
from deltune.sites.where import Where
from deltune.spec import Family, Paper, register, require


@register
@dataclass(frozen=True)
class HRA(Weight):
    """Householder reflection adaptation: each chosen matrix times a chain of reflections.

        W' = W H_1 H_2 ... H_r,    H_i = I - 2 v_i v_i^T,    v_i = u_i / |u_i|

    with u_i, the columns of U (in, r), trained; an embedding's W has its vectors as rows. The u_i
    are equal in pairs at first, so the model starts unchanged if r is even; with an odd r the last
    reflects alone. With `orthogonal` the v_i are the u_i after Gram and Schmidt, the product is
    I - 2 V V^T and never I, and all u_i start apart. With s other than 1 the change W' - W is
    scaled, which leaves the orthogonal matrices. Trainable: the sum over matrices of r in. Merges
    exactly.

    Source: Yuan, Liu and Xu, "Bridging The Gap between Low-rank and Orthogonal Adaptation via
    Householder Reflection Adaptation", 2024, arXiv:2405.17484.
    Differs: the penalty that draws the u_i towards being orthogonal is not there, only its two
    ends, none and `orthogonal`. The chain is one product, W' - W = -(W V) T V^T with T^-1 the upper
    triangle of V^T V, halved on its diagonal; the basis of `orthogonal` is that of a QR
    decomposition.
    """

    kind: ClassVar[str] = "hra"
    family: ClassVar[Family] = "reparameterization"
    paper: ClassVar[Paper | None] = Paper(
        "Yuan et al.",
        "Bridging The Gap between Low-rank and Orthogonal Adaptation via Householder Reflection "
        "Adaptation", 2024, "2405.17484",
    )  # fmt: skip
    checked: ClassVar[str] = "PEFT 0.21.2: equal outputs"
    factored: ClassVar[bool] = False

    rank: int = 8
    """Number r of reflections; even, for the model to start unchanged."""
    orthogonal: bool = False
    """Whether the reflections are made orthogonal to each other."""
    where: Where = "attn.q, attn.v"
    """The matrices to adapt."""

    def __post_init__(self) -> None:
        require(self.rank >= 1, self, "rank", "1 or more")

    def tensors(self, site: Site, atlas: Atlas) -> dict[str, Param]:
        features = turned_features(site)
        if self.orthogonal and self.rank > features:
            raise SpecError(
                f"`{self}`: the matrix at `{site.path}` has {features} features to reflect, and no "
                f"{self.rank} directions are orthogonal there; use a rank of at most {features}"
            )
        start = fan_in_uniform(self.rank) if self.orthogonal else _pairs
        return {"U": Param((*site.shape[:-2], features, self.rank), start)}

    def difference(self, t: Unit, weight: Tensor) -> Tensor:
        with torch.autocast(t.U.device.type, enabled=False):  # equal pairs cancel to rounding
            W = features_last(t.site, t.site.matrix(weight)).to(t.U.dtype)
            if self.orthogonal:
                V = torch.linalg.qr(t.U).Q
                return features_last(t.site, -2 * (W @ V) @ V.mT)
            V = t.U / t.U.norm(dim=-2, keepdim=True)
            half = 0.5 * torch.eye(self.rank, dtype=V.dtype, device=V.device)
            TV = torch.linalg.solve_triangular((V.mT @ V).triu(1) + half, V.mT, upper=True)
            return features_last(t.site, -(W @ V) @ TV)


def _pairs(tensor: Tensor, generator: torch.Generator | None) -> None:
    """Columns that are equal in pairs, Kaiming-uniform over half of them."""
    half = torch.empty_like(tensor[..., ::2])
    fan_in_uniform(half.shape[-1])(half, generator)
    tensor.copy_(half.repeat_interleave(2, -1)[..., : tensor.shape[-1]])
