"""LoRA: low-rank adaptation."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from deltune.errors import SpecError
from deltune.mechanisms.gate import Gate, gate_start, gate_tensors
from deltune.mechanisms.tensors import Param, kaiming, normal, zeros
from deltune.mechanisms.terms import Held, Terms
from deltune.mechanisms.unit import Mechanism, Unit
from deltune.mechanisms.weight import LowRank, Weight, check_rank, matrices, one_rank
from deltune.sites.discover import Atlas
from deltune.sites.site import Site
from deltune.sites.where import Where, select
from deltune.spec import Family, Paper, register, require


@register
@dataclass(frozen=True)
class LoRA(Weight):
    """Low-rank adaptation: a product of two thin matrices beside each chosen matrix.

        y = x W^T + b + s * drop(x) A^T B^T,    s = alpha / r

    (s = alpha / sqrt(r) with `scaling="root"`) with A (r, in) and B (out, r) trained; B = 0 at
    first, so the model starts unchanged. On an embedding y = W[ids] + s * A^T[ids] B^T, with
    A (r, vocabulary) = 0 and B ~ N(0, 1). A fused matrix has one pair for each role, each of rank
    r; stored 3-D expert weights have one for each expert. With `gate` s is a number G of each
    example, G = mean over its tokens of sigmoid(w_g . x + b_g), and alpha has no say.
    Trainable: the sum over matrices of r (in + out), and of in + 1 with a gate. Merges exactly,
    unless gated.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021,
    arXiv:2106.09685, eq. 3; `scaling="root"`: Kalajdzievski 2023, arXiv:2312.03732; `gate`: Mao et
    al. 2022, arXiv:2110.07577.
    Differs: A is Kaiming-uniform, U(-1/sqrt(in), 1/sqrt(in)), as in the authors' code; the paper
    says Gaussian. Dropout is off on embeddings and where only the dense weight can be changed. A
    convolution has one pair for its weight as a matrix (out, in k k); the authors' code gives it
    the rank r k. Biases are tuned by `lora + bitfit`, not by a mode of their own.
    """

    kind: ClassVar[str] = "lora"
    family: ClassVar[Family] = "reparameterization"
    paper: ClassVar[Paper | None] = Paper(
        "Hu et al.", "LoRA: Low-Rank Adaptation of Large Language Models", 2021, "2106.09685"
    )
    checked: ClassVar[str] = "PEFT 0.21.2: equal outputs and gradients"
    sizes: ClassVar[tuple[str, ...]] = ("rank",)

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

    def sites(self, atlas: Atlas) -> list[Site]:
        if not isinstance(self.rank, Mapping):
            return super().sites(atlas)
        return select(atlas, ", ".join(self.rank), matrices(atlas), self.within)

    def tensors(self, site: Site, atlas: Atlas) -> dict[str, Param]:
        *experts, out, into = site.shape
        r = self._rank(site, atlas)
        check_rank(self, site, r)
        embedding = site.kind == "embedding"
        gate = gate_tensors(self, site, atlas, into, *gate_start(into))
        return {
            "A": Param((*experts, r, into), zeros if embedding else kaiming),
            "B": Param((*experts, out, r), normal(1.0) if embedding else zeros),
            **gate,
        }

    def update(self, t: Unit) -> LowRank:
        return LowRank(t.A, t.B, self._scale(t.A.shape[-2]), self.dropout)

    def adopt(
        self, other: Mechanism, tensors: Mapping[str, Tensor],
        shapes: Mapping[str, tuple[int, ...]],
    ) -> dict[str, Tensor] | None:  # fmt: skip
        if not isinstance(other, LoRA) or not self.alpha:
            return None
        known = {"alpha": self.alpha, "scaling": self.scaling, "dropout": self.dropout}
        found = super().adopt(replace(other, **known), tensors, shapes)
        if found:
            scale = self._scale(shapes["A"][-2])
            found["B"] = found["B"] * (other._scale(tensors["A"].shape[-2]) / scale)
        return found

    def _scale(self, rank: int) -> float:
        root = rank if self.scaling == "linear" else rank**0.5
        return 1.0 if self.gate else self.alpha / root

    def nearest(self, t: Unit, change: Tensor) -> None:
        """A truncated SVD (Eckart and Young), its singular values shared by A and B."""
        r, scale = t.A.shape[-2], self.update(t).scale * t.scale
        if self.gate or not scale:
            super().nearest(t, change)
        left, values, right = torch.linalg.svd(change.double(), full_matrices=False)
        root = (values[..., :r].clamp(min=0) / abs(scale)).sqrt()
        t.A.copy_(root[..., :, None] * right[..., :r, :])
        t.B.copy_(left[..., :r] * root[..., None, :] * (1 if scale > 0 else -1))

    @property
    def meant(self) -> Where:
        return ", ".join(self.rank) if isinstance(self.rank, Mapping) else self.where

    def over(self, where: Where) -> "LoRA":
        ranks = self.rank.values() if isinstance(self.rank, Mapping) else [self.rank]
        return replace(self, rank=max(ranks), where=where)

    def hold(self, terms: Terms, units: Mapping[str, Unit]) -> Held:
        """Factors as they are, all of one rank; alpha is such that s stays."""
        r, factors = one_rank(terms)
        root = self.scaling == "root"
        before = self.over(self.meant).rank
        assert isinstance(before, int)
        s = (self.alpha / (before**0.5 if root else before)) or 1.0
        spec = replace(
            self, rank=r, alpha=s * (r**0.5 if root else r), where=self.meant, gate=False
        )
        found = {f"{key}.A": one.down for key, one in factors.items()}
        found |= {f"{key}.B": one.up * (one.scale / s) for key, one in factors.items()}
        return Held(spec, found)

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
