"""AdapterBias: one learned direction for each layer, and for each token how far to go along it."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from deltune.errors import AttachError
from deltune.mechanisms.insert import Insert, Placement, needs_width
from deltune.mechanisms.modules import matched
from deltune.mechanisms.tensors import Param, fan_in_uniform, kaiming, zeros
from deltune.mechanisms.unit import Unit
from deltune.sites.discover import Atlas
from deltune.sites.matrices import matrix, reader
from deltune.sites.site import Site
from deltune.sites.where import Where
from deltune.spec import Family, Paper, register


@register
@dataclass(frozen=True)
class AdapterBias(Insert):
    """A shift of each token along one learned direction of its layer, by an amount of its own.

        h <- h + (w . g + c) v,    h = drop(W2 g + b2)

    with h the output of a feed-forward part before the residual addition and g (f features) what
    its last linear map W2 reads; v (d), w (f) and c (1) in each layer. With `reads="output"` the
    amount is w . h + c, as the paper writes it. v = 0 at first, so the model starts unchanged.

    Trainable: d + f + 1 for each layer (46,092 on BERT-base), or 2 d + 1 with `reads="output"`;
    `share` has one w and c for all layers. Merges exactly: W2 <- W2 + v w^T and b2 <- b2 + c v, or
    W2 <- (I + v w^T) W2 and b2 <- (I + v w^T) b2 + c v; where W2 has no bias it cannot.

    Source: Fu et al., "AdapterBias: Parameter-efficient Token-dependent Representation Shift for
    Adapters in NLP Tasks", 2022, arXiv:2205.00305.
    Differs: `reads="inner"` is the released code. The authors also train LayerNorms, as
    `adapter_bias + norms` does with a `where`, without weight decay on them.
    """

    kind: ClassVar[str] = "adapter_bias"
    family: ClassVar[Family] = "addition"
    merges: ClassVar[bool] = True
    paper: ClassVar[Paper | None] = Paper(
        "Fu et al.",
        "AdapterBias: Parameter-efficient Token-dependent Representation Shift for Adapters in NLP "
        "Tasks", 2022, "2205.00305",
    )  # fmt: skip

    reads: Literal["inner", "output"] = "inner"
    """Whether the amount is read from g or from h."""
    share: bool = False
    """Whether all layers share w and c."""
    where: Where = "ffn"
    """The sub-layers."""

    def sites(self, atlas: Atlas) -> list[Site]:
        found = super().sites(atlas)
        return found if self.reads == "output" else [_inside(site, atlas) for site in found]

    def group(self, site: Site) -> str:
        return f"{self._read(site)}" if self.share else ""

    def shared(self, sites: list[Site]) -> dict[str, Param]:
        return self._amount(self._read(sites[0]))

    def tensors(self, site: Site, atlas: Atlas) -> dict[str, Param]:
        own = {} if self.share else self._amount(self._read(site))
        return {"v": Param((needs_width(site, self.kind),), zeros), **own}

    def transform(self, t: Unit, x: Tensor) -> Tensor:
        source = t.shared if self.share else t
        v, w, c = matched(x, t.v, source.w, source.c)
        return (x @ w + c)[..., None] * v

    def fused(self, t: Unit, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        source = t.shared if self.share else t
        if self.reads == "inner":
            return t.v[:, None] * source.w, source.c * t.v
        shift = source.c if bias is None else source.w @ bias + source.c
        return t.v[:, None] * (source.w @ weight), shift * t.v

    def geometry(self, site: Site) -> Placement:
        return "parallel" if self.reads == "inner" else "serial"

    def _read(self, site: Site) -> int:
        """The number of features that w reads."""
        return site.shape[-1] if self.reads == "inner" else needs_width(site, self.kind)

    @staticmethod
    def _amount(features: int) -> dict[str, Param]:
        return {"w": Param((features,), kaiming), "c": Param((1,), fan_in_uniform(features))}


def _inside(site: Site, atlas: Atlas) -> Site:
    """The site with the input of its last linear map as what it reads."""
    if not site.last or reader(site.last, atlas.modules) != site.last:
        raise AttachError(
            f"`adapter_bias` finds no single linear map, called as a module, that ends "
            f"`{site.path}`; choose other places, or `reads='output'`"
        )
    shape = matrix(site.last, atlas.modules[site.last])["shape"]
    return site._replace(entry=site.last, shape=shape)
