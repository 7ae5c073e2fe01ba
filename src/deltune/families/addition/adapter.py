"""Bottleneck adapters: Houlsby, Pfeiffer, parallel, and those of speech translation."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor
from torch.nn import functional as F

from deltune.mechanisms.activations import ACTIVATIONS, Activation
from deltune.mechanisms.gate import Gate, gate_tensors
from deltune.mechanisms.insert import Insert, Placement, bottleneck, check_bottleneck, needs_width
from deltune.mechanisms.modules import matched
from deltune.mechanisms.tensors import Param, kaiming, normal, ones, truncated, zeros
from deltune.mechanisms.unit import Unit
from deltune.sites.discover import Atlas
from deltune.sites.site import Site
from deltune.sites.where import Where
from deltune.spec import Family, Paper, register, require

INITS = {
    "houlsby": (truncated(1e-3),) * 2, "bert": (normal(0.02),) * 2, "speech": (normal(0.01),) * 2,
    "zero": (kaiming, zeros),
}  # fmt: skip


@register
@dataclass(frozen=True)
class Adapter(Insert):
    """A two-layer bottleneck network in each sub-layer.

        f(x) = s * ( U drop(g(D x + b1)) + b2 ),    D (m, d), U (d, m)

    serial    h <- h + f(h): h the sub-layer's output, before the residual addition (Houlsby)
    pfeiffer  out = LN(h + a + f(LN(h + a))): a the residual, LN the model's own frozen norm used
              twice; in pre-norm models, which have no norm there, h <- h + f(h)
    parallel  h <- h + f(x): x the sub-layer's input (He et al.)

    With `norm` D reads LN(x), with a gain and bias (d) of the adapter's own, 1 and 0 at first. With
    `gate` f is times a number G of each example, G = mean over its tokens of sigmoid(w_g . x +
    b_g), w_g ~ N(0, 0.02^2) and b_g = 0 at first.
    Trainable: 2dm + m + d for each sub-layer, m + d less without `bias`, 2d more with `norm`, d + 1
    with a gate. It does not merge.

    Source: Houlsby et al. 2019, arXiv:1902.00751, fig. 2; Pfeiffer et al. 2021, arXiv:2005.00247;
    He et al. 2022, arXiv:2110.04366, table 1; `norm`: Le et al. 2021, arXiv:2106.01463; `gate`: Mao
    et al. 2022, arXiv:2110.07577; `robust`: Rueckle et al. 2021, arXiv:2010.11918.
    Differs: Houlsby et al. also train the LayerNorms: `adapter + norms`. Where a model applies
    dropout to the sub-layer's output inside a forward function, out of the reach of hooks, the
    adapter reads before that dropout. AdapterDrop's adapters that all layers share are left out.
    """

    kind: ClassVar[str] = "adapter"
    family: ClassVar[Family] = "addition"
    later: ClassVar[tuple[str, ...]] = ("bias",)
    sizes: ClassVar[tuple[str, ...]] = ("width", "reduction")
    paper: ClassVar[Paper | None] = Paper(
        "Houlsby et al.", "Parameter-Efficient Transfer Learning for NLP", 2019, "1902.00751"
    )

    width: int | None = None
    """Bottleneck m; 64 if neither this nor `reduction` is given."""
    reduction: float | None = None
    """Bottleneck as d / m, instead of `width`."""
    placement: Literal["serial", "pfeiffer", "parallel"] = "serial"
    """Where the network reads and writes."""
    activation: Activation = "gelu"
    """g; `gelu` is the tanh approximation of `gelu_exact`."""
    scale: float = 1.0
    """s."""
    init: Literal["houlsby", "bert", "speech", "zero"] = "houlsby"
    """`houlsby`: truncated normal, 1e-3; `bert`: N(0, 0.02^2); `speech`: N(0, 0.01^2); `zero`:
    Kaiming D and U = 0, an exact identity at first. Biases start at 0."""
    dropout: float = 0.0
    """Dropout in the bottleneck, in training."""
    bias: bool = True
    """Whether there are b1 and b2."""
    norm: bool = False
    """Whether the adapter has a LayerNorm of its own at its input."""
    gate: Gate = False
    """False, True (mean over real tokens), `padded` (mean over all positions, as in the released
    code) or `token` (no mean: one of each token, also for decoders)."""
    where: Where = "attn, ffn"
    """The sub-layers."""

    def __post_init__(self) -> None:
        check_bottleneck(self, self.width, self.reduction)
        require(0.0 <= self.dropout < 1.0, self, "dropout", "in [0, 1)")

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
    def parallel(
        cls, width: int = 16, scale: float = 2.0, where: Where = "ffn", dropout: float = 0.1
    ) -> "Adapter":
        """The scaled parallel adapter (He et al. 2022), with the dropout of base encoders."""
        return cls(width=width, placement="parallel", activation="relu", init="zero", scale=scale,
                   dropout=dropout, where=where)  # fmt: skip

    @classmethod
    def speech(cls, width: int = 256, where: Where = "ffn") -> "Adapter":
        """Adapters with a LayerNorm of their own (Le et al. 2021, for speech translation)."""
        return cls(width=width, activation="relu", init="speech", norm=True, where=where)

    def tensors(self, site: Site, atlas: Atlas) -> dict[str, Param]:
        d = needs_width(site, self.kind)
        if self.placement == "parallel":
            self.check_entry(site, atlas)
        given = self.width or (None if self.reduction else 64)
        m, (down, up) = bottleneck(d, given, self.reduction or 1.0), INITS[self.init]
        norm = {"gain": Param((d,), ones), "bias": Param((d,), zeros)} if self.norm else {}
        b1, b2 = ({n: Param((k,), zeros)} if self.bias else {} for n, k in (("b1", m), ("b2", d)))
        return {
            "D": Param((m, d), down), **b1, "U": Param((d, m), up), **b2, **norm,
            **gate_tensors(self, site, atlas, d, normal(0.02), zeros),
        }  # fmt: skip

    def transform(self, t: Unit, x: Tensor) -> Tensor:
        down, up = matched(x, t.D, t.U)
        b1, b2 = matched(x, t.b1, t.b2) if self.bias else (None, None)
        if self.norm:
            gain, bias = matched(x, t.gain, t.bias)
            x = F.layer_norm(x, x.shape[-1:], gain, bias)
        hidden = ACTIVATIONS[self.activation](F.linear(x, down, b1))
        hidden = F.dropout(hidden, self.dropout, t.training and self.dropout > 0)
        change = F.linear(hidden, up, b2)
        return change if self.scale == 1.0 else self.scale * change

    def geometry(self, site: Site) -> Placement:
        normed = "normed" if site.norm else "serial"
        return normed if self.placement == "pfeiffer" else self.placement
