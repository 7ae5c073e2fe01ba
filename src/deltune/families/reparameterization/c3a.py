"""C3A: circular convolutions between the blocks of inputs and outputs."""

from dataclasses import dataclass
from math import gcd, sqrt
from typing import ClassVar, Literal

from deltune.errors import SpecError
from deltune.mechanisms.circulant import BlockCirculant
from deltune.mechanisms.tensors import Param, normal, uniform, zeros
from deltune.mechanisms.unit import Unit
from deltune.mechanisms.weight import Weight
from deltune.sites.discover import Atlas
from deltune.sites.site import Site
from deltune.sites.where import Where
from deltune.spec import Family, Paper, register, require


@register
@dataclass(frozen=True)
class C3A(Weight):
    """Circular convolutions between blocks of features beside each chosen matrix.

        y = x W^T + b + s * x C(K)^T / in,    C(K)_ij[u, t] = K_ij[(t - u) mod b]

    with kernels K (out / b, in / b, b) trained, b = `block`: C(K) consists of circulant blocks
    b x b, whose rank can be b, each with K_ij as its first row. It is evaluated by fast Fourier
    transforms. K is small and random at first, so the model starts slightly changed; with
    `init="zero"` it does not.
    Trainable: the sum over matrices of in out / b; a 768 x 768 matrix has 2,304 for b = 256.
    Merges exactly.

    Source: Chen et al., "Parameter-Efficient Fine-Tuning via Circular Convolution", 2024,
    arXiv:2407.19342.
    Differs: the division by `in` and the starts are those of PEFT. The row of padding in an
    embedding changes with the others.
    """

    kind: ClassVar[str] = "c3a"
    family: ClassVar[Family] = "reparameterization"
    paper: ClassVar[Paper | None] = Paper(
        "Chen et al.", "Parameter-Efficient Fine-Tuning via Circular Convolution", 2024,
        "2407.19342",
    )  # fmt: skip
    checked: ClassVar[str] = "PEFT 0.21.2: equal outputs"

    block: int = 256
    """Size b of the blocks; divides both sides of every matrix."""
    init: Literal["xavier", "kaiming", "normal", "zero"] = "xavier"
    """The kernels at first: uniform within sqrt(6 / (in + out)) or within 1 / sqrt(in), N(0, 1),
    or 0."""
    where: Where = "attn.q, attn.v"
    """The matrices to adapt."""

    def __post_init__(self) -> None:
        require(self.block >= 1, self, "block", "1 or more")

    def tensors(self, site: Site, atlas: Atlas) -> dict[str, Param]:
        (*experts, out, into), b = site.shape, self.block
        if out % b or into % b:
            raise SpecError(
                f"`c3a(block={b})`: {b} does not divide both sides of the {out} x {into} matrix at "
                f"`{site.path}`; use a divisor of {gcd(out, into)}, or leave it out of `where`"
            )
        bounds = {"xavier": sqrt(6 / (out + into)), "kaiming": into**-0.5}
        start = {"normal": normal(1.0), "zero": zeros} | {
            name: uniform(-bound, bound) for name, bound in bounds.items()
        }
        return {"K": Param((*experts, out // b, into // b, b), start[self.init])}

    @property
    def linear(self) -> bool:
        return True

    def update(self, t: Unit) -> BlockCirculant:
        return BlockCirculant(t.K, 1 / t.site.shape[-1])
