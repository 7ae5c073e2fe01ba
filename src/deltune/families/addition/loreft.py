"""LoReFT: edits of hidden states in a low-rank subspace."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from deltune.errors import SpecError
from deltune.mechanisms.interventions import Intervention
from deltune.mechanisms.modules import matched
from deltune.mechanisms.tensors import Param, fan_in_uniform, kaiming, orthonormal, wide
from deltune.mechanisms.unit import Unit
from deltune.sites.discover import Atlas
from deltune.sites.site import Site
from deltune.spec import Family, Paper, register


@register
@dataclass(frozen=True)
class LoReFT(Intervention):
    """Moves the hidden states of some tokens, in r directions, to where a linear map wants them.

        h_i <- h_i + R^T (W h_i + b - R h_i)

    behind each block, for the first `prefix` and the last `suffix` real tokens i of each row, with
    R (r, d) of orthonormal rows, W (r, d) and b (r) trained; the first and the last tokens have
    tensors of their own unless they are `tied`, and a token that is both has the last ones'. What
    is stored for R is any S (r, d), of which S^T = R^T T, T upper triangular with a positive
    diagonal; R = S without `orthogonal`. The model does not start unchanged. Tokens of a key/value
    cache count, so that generation with and without it is the same. Trainable: 2 r d + r for each
    block and end. It does not merge.

    Source: Wu et al., "ReFT: Representation Finetuning for Language Models", 2024,
    arXiv:2404.03592, eq. 4; `orthogonal=False` as in AdapterHub, `dropout` as in the released code:
    of the whole changed state.
    Differs: R comes from a QR decomposition, in the released code from torch's parametrisation by
    Householder reflections: other gradients, the same set of R. Tokens are those of the whole row:
    generated ones are among the first where a prompt has fewer, and `suffix` is refused in stacks
    whose tokens only look back, where the released code counts from the end of the prompt.
    """

    kind: ClassVar[str] = "loreft"
    family: ClassVar[Family] = "addition"
    paper: ClassVar[Paper | None] = Paper(
        "Wu et al.", "ReFT: Representation Finetuning for Language Models", 2024, "2404.03592"
    )

    orthogonal: bool = True
    """Whether the rows of R are orthonormal."""

    def tensors(self, site: Site, atlas: Atlas) -> dict[str, Param]:
        d, r = site.width, self.rank
        if r > d:
            raise SpecError(f"`{self}`: rank {r} is above the {d} features at `{site.path}`")
        own = {
            "R": Param((r, d), orthonormal if self.orthogonal else kaiming),
            "W": Param((r, d), kaiming),
            "b": Param((r,), fan_in_uniform(d)),
        }
        return self.each(site, atlas, own)

    def change(self, t: Unit, x: Tensor, end: str) -> Tensor:
        R = self.rotation(t.own(f"R{end}"))
        R, W, b = matched(x, R, t.own(f"W{end}"), t.own(f"b{end}"))
        return (F.linear(x, W, b) - F.linear(x, R)) @ R

    def rotation(self, stored: Tensor) -> Tensor:
        """R (r, d), from what is stored."""
        if not self.orthogonal:
            return stored
        Q, T = torch.linalg.qr(wide(stored).mT)
        return (Q * torch.where(T.diagonal() < 0, -1, 1)).mT
