"""Bottleneck adapters: Houlsby, Pfeiffer and parallel."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor
from torch.nn import functional as F

from deltune.mechanisms.insert import Insert, Placement, needs_width
from deltune.mechanisms.tensors import Param, kaiming, normal, truncated, zeros
from deltune.mechanisms.unit import Unit, matched
from deltune.sites.discover import Atlas
from deltune.sites.site import Site
from deltune.sites.where import Where
from deltune.spec import Family, Paper, register, require

ACTIVATIONS = {
    "gelu": lambda x: F.gelu(x, approximate="tanh"), "relu": F.relu, "silu": F.silu, "tanh": F.tanh,
}  # fmt: skip
INITS = {
    "houlsby": (truncated(1e-3), truncated(1e-3)),
    "bert": (normal(0.02), normal(0.02)),
    "zero": (kaiming, zeros),
}


@register
@dataclass(frozen=True)
class Adapter(Insert):
    """A two-layer bottleneck network in each sub-layer.

        f(x) = s * ( U g(D x + b1) + b2 ),    D (m, d), U (d, m)

    serial    h <- h + f(h): h the sub-layer's output, before the residual addition (Houlsby)
    pfeiffer  out = LN(h + a + f(LN(h + a))): a the residual, LN the model's own frozen norm used
              twice; in pre-norm models, which have no norm there, h <- h + f(h)
    parallel  h <- h + f(x): x the sub-layer's input (He et al.)

    Trainable: 2dm + m + d for each sub-layer. The nonlinearity keeps it from merging.

    Source: Houlsby et al. 2019, arXiv:1902.00751, fig. 2; Pfeiffer et al. 2021, arXiv:2005.00247;
    He et al. 2022, arXiv:2110.04366, table 1.
    Differs: LayerNorms stay frozen also for Houlsby, who trains
    them. Where a model applies dropout to the sub-layer's output inside a forward function, out
    of the reach of hooks, the adapter reads before that dropout. Dropout in the bottleneck of the
    parallel form is left out.
    """

    kind: ClassVar[str] = "adapter"
    family: ClassVar[Family] = "addition"
    paper: ClassVar[Paper | None] = Paper(
        "Houlsby et al.", "Parameter-Efficient Transfer Learning for NLP", 2019, "1902.00751"
    )

    width: int | None = None
    """Bottleneck m; 64 if neither this nor `reduction` is given."""
    reduction: float | None = None
    """Bottleneck as d / m, instead of `width`."""
    placement: Literal["serial", "pfeiffer", "parallel"] = "serial"
    """Where the network reads and writes."""
    activation: Literal["gelu", "relu", "silu", "tanh"] = "gelu"
    """g; `gelu` is the tanh approximation."""
    scale: float = 1.0
    """s."""
    init: Literal["houlsby", "bert", "zero"] = "houlsby"
    """`houlsby`: truncated normal, 1e-3; `bert`: N(0, 0.02^2); `zero`: Kaiming D and U = 0, an
    exact identity at first. Biases start at 0."""
    where: Where = "attn, ffn"
    """The sub-layers."""

    def __post_init__(self) -> None:
        require(self.width is None or self.width >= 1, self, "width", "1 or more")
        require(self.reduction is None or self.reduction >= 1, self, "reduction", "1 or more")
        require(self.width is None or self.reduction is None, self, "reduction",
                "left out where `width` is given")  # fmt: skip

    @classmethod
    def houlsby(cls, width: int = 64, where: Where = "attn, ffn") -> "Adapter":
        """Two serial adapters in each layer (Houlsby et al. 2019)."""
        return cls(width=width, where=where)

    @classmethod
    def pfeiffer(cls, reduction: float = 16.0, where: Where = "ffn") -> "Adapter":
        """One adapter in each layer, behind the feed-forward part (Pfeiffer et al. 2021)."""
        return cls(reduction=reduction, placement="pfeiffer", activation="relu", init="bert",
                   where=where)  # fmt: skip

    @classmethod
    def parallel(cls, width: int = 16, scale: float = 2.0, where: Where = "ffn") -> "Adapter":
        """The scaled parallel adapter (He et al. 2022)."""
        return cls(width=width, placement="parallel", activation="relu", init="zero", scale=scale,
                   where=where)  # fmt: skip

    def tensors(self, site: Site, atlas: Atlas) -> dict[str, Param]:
        d = needs_width(site, self.kind)
        m = self.width or (max(1, int(d / self.reduction)) if self.reduction else 64)
        down, up = INITS[self.init]
        return {
            "D": Param((m, d), down), "b1": Param((m,), zeros),
            "U": Param((d, m), up), "b2": Param((d,), zeros),
        }  # fmt: skip

    def transform(self, t: Unit, x: Tensor) -> Tensor:
        down, b1, up, b2 = matched(x, t.D, t.b1, t.U, t.b2)
        change = F.linear(ACTIVATIONS[self.activation](F.linear(x, down, b1)), up, b2)
        return change if self.scale == 1.0 else self.scale * change

    def geometry(self, site: Site) -> Placement:
        if self.placement == "pfeiffer":
            return "normed" if site.norm else "serial"
        return "parallel" if self.placement == "parallel" else "serial"
