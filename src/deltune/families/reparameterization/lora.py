"""LoRA: low-rank adaptation."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from deltune.errors import SpecError
from deltune.mechanisms import starts
from deltune.mechanisms.factors import LowRank
from deltune.mechanisms.gate import Gate, gate_start, gate_tensors
from deltune.mechanisms.pairs import Paired
from deltune.mechanisms.tensors import Param, kaiming, normal, zeros
from deltune.mechanisms.unit import Unit
from deltune.mechanisms.weight import check_rank, matrices
from deltune.sites.discover import Atlas
from deltune.sites.site import Site
from deltune.sites.where import Where, select
from deltune.spec import Family, Paper, register, require


@register
@dataclass(frozen=True)
class LoRA(Paired):
    """Low-rank adaptation: a product of two thin matrices beside each chosen matrix.

        y = x W^T + b + s * drop(x) A^T B^T,    s = alpha / r

    (s = alpha / sqrt(r) with `scaling="root"`) with A (r, in) and B (out, r) trained; B = 0 at
    first, so the model starts unchanged. On an embedding y = W[ids] + s * A^T[ids] B^T, with
    A (r, vocabulary) = 0 and B ~ N(0, 1). A fused matrix has one pair for each role, each of rank
    r; stored 3-D expert weights have one for each expert. With `gate` s is a number G of each
    example, G = mean over its tokens of sigmoid(w_g . x + b_g), and alpha has no say.

    With `init` A and B start elsewhere. Where their product at first, B0 A0, is not 0, it is kept
    and taken away, so that the model starts unchanged and W stays what it is:

        W' = W + s (B A - B0 A0)

    pissa        s B0 A0 = the r largest singular triplets of W
    olora        B0 = r columns of Q, A0 = r rows of R, with Q R = W
    corda        s B0 A0 C = the r largest singular triplets of W C, C = E[x x^T] of the inputs;
                 `corda_kpm`: its r smallest
    eva          B = 0 and A = the r directions in which the inputs vary most

    the last three from training examples, so that training has to be a loop that shows them.
    `frozen` keeps A as it starts. `rate` is B's learning rate over A's.
    Trainable: the sum over matrices of r (in + out), of r out with `frozen`, and of in + 1 more
    with a gate. Merges exactly, unless gated. `delta.fold()` has B0 A0 in a rank of 2 r.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021,
    arXiv:2106.09685, eq. 3; `scaling="root"`: Kalajdzievski 2023, arXiv:2312.03732; `gate`: Mao et
    al. 2022, arXiv:2110.07577; `init`: Meng et al. 2024, arXiv:2404.02948 (PiSSA), Bueyuekakyuez
    2024, arXiv:2406.01775 (OLoRA), Yang et al. 2024, arXiv:2406.05223 (CorDA), Paischer et al.
    2024, arXiv:2410.07170 (EVA); `frozen`: Zhang et al. 2023, arXiv:2308.03303 (LoRA-FA); `rate`:
    Hayou et al. 2024, arXiv:2402.12354 (LoRA+).
    Differs: A is Kaiming-uniform, U(-1/sqrt(in), 1/sqrt(in)), as in the authors' code; the paper
    says Gaussian. Dropout is off on embeddings and where only the dense weight can be changed. A
    convolution has one pair for its weight as a matrix (out, in k k); the authors' code gives it
    the rank r k. Biases are tuned by `lora + bitfit`, not by a mode of their own. The papers on
    `init` write W - s B0 A0 over the backbone's weight; there dropout drops the input of B A, here
    that of B A - B0 A0. EVA spreads its ranks over the matrices; here each has r. PEFT's
    optimiser of LoRA-FA also multiplies the gradient of B by (A A^T)^-1 / s^2.
    """

    kind: ClassVar[str] = "lora"
    family: ClassVar[Family] = "reparameterization"
    paper: ClassVar[Paper | None] = Paper(
        "Hu et al.", "LoRA: Low-Rank Adaptation of Large Language Models", 2021, "2106.09685"
    )
    checked: ClassVar[str] = "PEFT 0.21.2: equal outputs, gradients and starts"
    sizes: ClassVar[tuple[str, ...]] = ("rank", "alpha", "scaling", "dropout")
    later: ClassVar[tuple[str, ...]] = ("init", "examples", "frozen", "rate")

    rank: int | Mapping[str, int] = 8
    """Rank r, or one for each term of `where`: `{"attn.q": 4, "attn.v": 16}`."""
    alpha: float = 16.0
    """Numerator of the scale s."""
    dropout: float = 0.0
    """Dropout on the input of A, in training."""
    scaling: Literal["linear", "root"] = "linear"
    """`linear` (alpha / r) or `root` (alpha / sqrt(r), rank-stabilised)."""
    gate: Gate = False
    """A gate in place of s: False, True (mean over real tokens), `padded` (mean over all positions,
    as in the released code) or `token` (no mean: one of each token, also for decoders)."""
    where: Where = "attn.q, attn.v"
    """The matrices to adapt."""

    def __post_init__(self) -> None:
        ranks = self.rank.values() if isinstance(self.rank, Mapping) else [self.rank]
        require(bool(ranks) and all(r >= 1 for r in ranks), self, "rank", "1 or more")
        require(0.0 <= self.dropout < 1.0, self, "dropout", "in [0, 1)")
        super().__post_init__()

    def sites(self, atlas: Atlas) -> list[Site]:
        if not isinstance(self.rank, Mapping):
            return super().sites(atlas)
        return select(atlas, ", ".join(self.rank), matrices(atlas), self.within)

    def tensors(self, site: Site, atlas: Atlas) -> dict[str, Param]:
        *experts, out, into = site.shape
        r = self._rank(site, atlas)
        check_rank(self, site, r)
        embedding = site.kind == "embedding"
        pair = {
            "A": Param((*experts, r, into), zeros if embedding else kaiming),
            "B": Param((*experts, out, r), normal(1.0) if embedding else zeros),
        }
        made = self.start(pair, site, atlas, self.scale_at(r))
        return made | gate_tensors(self, site, atlas, into, *gate_start(into))

    def update(self, t: Unit) -> LowRank:
        return LowRank(*starts.moved(t), self.scale_at(t.A.shape[-2]), self.dropout)

    def scale_at(self, rank: int) -> float:
        root = rank if self.scaling == "linear" else rank**0.5
        return 1.0 if self.gate else self.alpha / root

    def of_scale(self, rank: int | Mapping[str, int], scale: float, of: int) -> "LoRA":
        alpha = scale * (of if self.scaling == "linear" else of**0.5)
        return replace(self, rank=rank, alpha=alpha, init="zero")

    @property
    def meant(self) -> Where:
        return ", ".join(self.rank) if isinstance(self.rank, Mapping) else self.where

    def over(self, where: Where) -> "LoRA":
        ranks = self.rank.values() if isinstance(self.rank, Mapping) else [self.rank]
        return replace(self, rank=max(ranks), where=where)

    def _rank(self, site: Site, atlas: Atlas) -> int:
        if not isinstance(self.rank, Mapping):
            return self.rank
        plain = site._replace(attention="")
        found = {
            rank for term, rank in self.rank.items()
            if plain in select(atlas, term, matrices(atlas))
        }  # fmt: skip
        if len(found) > 1:
            raise SpecError(f"`lora(rank={self.rank!r})` gives `{site.path}` several ranks")
        return found.pop()
