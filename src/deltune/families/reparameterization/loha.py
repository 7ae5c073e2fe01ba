"""LoHa: a Hadamard product of two low-rank matrices."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from deltune.mechanisms.tensors import Param, fan_in_uniform, kaiming, zeros
from deltune.mechanisms.unit import Unit
from deltune.mechanisms.weight import Weight, check_rank
from deltune.sites.discover import Atlas
from deltune.sites.site import Site
from deltune.sites.where import Where
from deltune.spec import Family, Paper, register, require


@register
@dataclass(frozen=True)
class LoHa(Weight):
    """A Hadamard product of two low-rank matrices beside each chosen matrix.

        y = x W^T + b + s * x ((B1 A1) (.) (B2 A2))^T,    s = alpha / r

    with A_i (r, in) and B_i (out, r) trained. The product has a rank of up to r^2 with the scalars
    of rank 2 r. A2 = 0 at first, so the model starts unchanged. Trainable: the sum over matrices of
    2 r (in + out). Merges exactly.

    Source: Hyeon-Woo, Ye-Bin and Oh, "FedPara: Low-Rank Hadamard Product for Communication-
    Efficient Federated Learning", 2021, arXiv:2108.06098, proposition 1; as a change beside the
    frozen weight: Yeh et al., "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to
    Model Evaluation", 2023, arXiv:2309.14859, eq. 5.
    Differs: A1, B1 and B2 are Kaiming-uniform and A2 is 0, as in PEFT; LyCORIS draws normal ones.
    The product is made whole: dropping its rows or all of it in training is not there.
    """

    kind: ClassVar[str] = "loha"
    family: ClassVar[Family] = "reparameterization"
    paper: ClassVar[Paper | None] = Paper(
        "Hyeon-Woo et al.",
        "FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning", 2021,
        "2108.06098",
    )  # fmt: skip
    checked: ClassVar[str] = "PEFT 0.21.2: equal outputs"
    factored: ClassVar[bool] = False

    rank: int = 8
    """Rank r of each of the two matrices."""
    alpha: float = 8.0
    """Numerator of the scale s."""
    where: Where = "attn.q, attn.v"
    """The matrices to adapt."""

    def __post_init__(self) -> None:
        require(self.rank >= 1, self, "rank", "1 or more")

    def tensors(self, site: Site, atlas: Atlas) -> dict[str, Param]:
        *experts, out, into = site.shape
        check_rank(self, site, self.rank)
        down, up = (*experts, self.rank, into), (*experts, out, self.rank)
        return {
            "A1": Param(down, kaiming),
            "B1": Param(up, fan_in_uniform(self.rank)),
            "A2": Param(down, zeros),
            "B2": Param(up, fan_in_uniform(self.rank)),
        }

    def difference(self, t: Unit, weight: Tensor) -> Tensor:
        return self.alpha / self.rank * (t.B1 @ t.A1) * (t.B2 @ t.A2)
