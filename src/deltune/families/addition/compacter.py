"""Compacter: adapters whose weights are sums of Kronecker products."""

from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor

from deltune.errors import SpecError
from deltune.mechanisms.activations import ACTIVATIONS, Activation
from deltune.mechanisms.insert import Insert, bottleneck, check_bottleneck, layers, needs_width
from deltune.mechanisms.modules import matched
from deltune.mechanisms.phm import phm_linear
from deltune.mechanisms.tensors import Param, glorot, normal, zeros
from deltune.mechanisms.unit import Unit
from deltune.sites.discover import Atlas
from deltune.sites.site import Site
from deltune.sites.where import Where, select
from deltune.spec import Family, Paper, register, require


@register
@dataclass(frozen=True)
class Compacter(Insert):
    """An adapter with both its matrices from parameterised hypercomplex multiplication.

        h <- h + g(h H_D + b1) H_U + b2,    H = sum_i A_i (x) S_i,    i = 1 ... n

    with h the output of a sub-layer before the residual addition, g the tanh approximation of GELU,
    rules A (n, n, n), and S_i = u_i v_i of rank r, or (`rank=None`) S_i itself, so that H_D has the
    shape (d, m) and H_U (m, d). All adapters of the model share A (`share`), or each of their
    matrices has its own. `plus` is Compacter++, in the feed-forward parts only.

    Trainable for each sub-layer: 2 r (d + m) + m + d with a rank, else 2 d m / n + m + d; and n^3
    for A, shared, or 2 n^3 for each sub-layer. T5-base at the defaults: 114,112; with `plus`
    57,088. It does not merge, since g is not linear; `deltune.mechanisms.phm.phm_matrix` gives H,
    with which a plain adapter does the same.

    Source: Karimi Mahabadi et al., "Compacter: Efficient Low-Rank Hypercomplex Adapter Layers",
    2021, arXiv:2106.04647.
    Differs: the authors also train the LayerNorms: `compacter + norms`.
    """

    kind: ClassVar[str] = "compacter"
    family: ClassVar[Family] = "addition"
    later: ClassVar[tuple[str, ...]] = ("activation",)
    paper: ClassVar[Paper | None] = Paper(
        "Karimi Mahabadi et al.", "Compacter: Efficient Low-Rank Hypercomplex Adapter Layers",
        2021, "2106.04647",
    )  # fmt: skip

    n: int = 4
    """Number of terms n; divides d and m."""
    rank: int | None = 1
    """Rank r of every S_i; None for whole matrices."""
    width: int | None = None
    """Bottleneck m; d / 32 if neither this nor `reduction` is given."""
    reduction: float | None = None
    """Bottleneck as d / m, instead of `width`."""
    share: bool = True
    """Whether all adapters share the rules A."""
    plus: bool = False
    """Compacter++: only behind feed-forward parts."""
    activation: Activation = field(default="gelu", kw_only=True)
    """g; `gelu` is the tanh approximation of `gelu_exact`."""
    where: Where = ""
    """The sub-layers; by default self-attention and feed-forward parts, no cross-attention."""

    def __post_init__(self) -> None:
        require(self.n >= 1, self, "n", "1 or more")
        require(self.rank is None or self.rank >= 1, self, "rank", "1 or more, or None")
        require(not (self.plus and self.where), self, "plus", "left out where `where` is given")
        check_bottleneck(self, self.width, self.reduction)

    @classmethod
    def phm(cls, n: int = 12, reduction: float = 32.0) -> "Compacter":
        """PHM adapters: whole S_i, and rules of its own for every matrix."""
        return cls(n=n, rank=None, reduction=reduction, share=False)

    def sites(self, atlas: Atlas) -> list[Site]:
        where = self.where or ("ffn" if self.plus else "attn, ffn")
        known = [site for site in layers(atlas) if self.where or site.stack != "cross"]
        return select(atlas, where, known, self.within)

    def group(self, site: Site) -> str:
        return "rules" if self.share else ""

    def shared(self, sites: list[Site]) -> dict[str, Param]:
        return {"A": Param((self.n, self.n, self.n), normal(1e-4))}

    def tensors(self, site: Site, atlas: Atlas) -> dict[str, Param]:
        d = needs_width(site, self.kind)
        m = bottleneck(d, self.width, self.reduction or 32.0)
        if d % self.n or m % self.n:
            raise SpecError(
                f"`{self.kind}(n={self.n})`: {self.n} does not divide both the {d} features at "
                f"`{site.path}` and the bottleneck of {m}; use an `n` and a `width` such that it "
                "divides both"
            )
        most = min(d, m) // self.n
        if self.rank is not None and self.rank > most:
            raise SpecError(
                f"`{self.kind}(rank={self.rank})`: at `{site.path}` every S_i has {d // self.n} "
                f"rows and {m // self.n} columns; use a rank of at most {most}, or "
                "`rank=None` for whole matrices"
            )
        return {
            **self._weights("D", d // self.n, m // self.n), "b1": Param((m,), zeros),
            **self._weights("U", m // self.n, d // self.n), "b2": Param((d,), zeros),
        }  # fmt: skip

    def transform(self, t: Unit, x: Tensor) -> Tensor:
        hidden = ACTIVATIONS[self.activation](self._linear(t, x, "D", t.b1))
        return self._linear(t, hidden, "U", t.b2)

    def _weights(self, name: str, into: int, out: int) -> dict[str, Param]:
        n, r, start = self.n, self.rank, glorot(2**0.5)
        found = {} if self.share else {f"A_{name}": Param((n, n, n), normal(0.01))}
        if r is None:
            return {**found, f"S_{name}": Param((n, into, out), start)}
        u, v = Param((n, into, r), start), Param((n, r, out), start)
        return {**found, f"u_{name}": u, f"v_{name}": v}

    def _linear(self, t: Unit, x: Tensor, name: str, bias: Tensor) -> Tensor:
        rules = t.shared.A if self.share else t.own(f"A_{name}")
        if self.rank is None:
            return phm_linear(x, *matched(x, rules, t.own(f"S_{name}"), bias))
        rules, u, v, bias = matched(x, rules, t.own(f"u_{name}"), t.own(f"v_{name}"), bias)
        return phm_linear(x, rules, (u, v), bias)
