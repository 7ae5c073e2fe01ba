"""Intrinsic dimension: all parameters moved along a few random directions."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from deltune.errors import SpecError
from deltune.families.specification.baselines import FullTuning
from deltune.mechanisms.projected import Projected, ProjectedUnit, names_of
from deltune.mechanisms.projections import PROJECTIONS, Fastfood, Projection
from deltune.mechanisms.select import backbone, plain
from deltune.mechanisms.tensors import Param, uniform, zeros
from deltune.mechanisms.terms import Held, Terms
from deltune.mechanisms.unit import Unit
from deltune.sites.discover import Atlas
from deltune.sites.site import Site
from deltune.sites.where import Where
from deltune.spec import Family, Paper, register, require


@register
@dataclass(frozen=True)
class Intrinsic(Projected):
    """Intrinsic dimension: every parameter of the backbone moves along few random directions.

        p_i' = p_i + s * lambda_i P_i v,    v trained, zero at first, shared by all parameters p_i

    P_i is a random map from the coordinates v to the size of p_i, drawn from `seed` and the name
    of p_i, and never stored; with `scope="global"` the P_i are the parts of one such map to all
    parameters, one after the other in the order of the model. lambda_i is 1 with `variant="did"`,
    and with `"said"` one trained scalar for each parameter, 1 at first.
    Trainable: exactly `dimension`. SAID spends one of them on each parameter, the rest is v.
    Merges exactly.

    Source: Aghajanyan et al., "Intrinsic Dimensionality Explains the Effectiveness of Language
    Model Fine-Tuning", 2021, arXiv:2012.13255; the projections are in `mechanisms.projections`. One
    map for all parameters: Li et al., "Measuring the Intrinsic Dimension of Objective Landscapes",
    2018, arXiv:1804.08838.
    Differs: the gradient of v is the true one; that of the released code is smaller by the padded
    size m of each parameter, which `gradient="released"` reproduces. That code has one lambda
    more, which it never uses, and cuts v for parameters smaller than it. The head is trained as it
    is, not projected.
    """

    kind: ClassVar[str] = "intrinsic"
    family: ClassVar[Family] = "reparameterization"
    paper: ClassVar[Paper | None] = Paper(
        "Aghajanyan et al.",
        "Intrinsic Dimensionality Explains the Effectiveness of Language Model Fine-Tuning", 2021,
        "2012.13255",
    )  # fmt: skip
    later: ClassVar[tuple[str, ...]] = ("scope",)

    dimension: int = 20_000
    """Number of trained scalars d'."""
    variant: Literal["said", "did"] = "said"
    """`said` trains a scale of each parameter, `did` has none."""
    projection: Literal["fastfood", "dense", "sparse"] = "fastfood"
    """The maps P_i; `dense` ones take dimension times the backbone of memory."""
    gradient: Literal["exact", "released"] = "exact"
    """`released` divides the gradient of v by m, as the code of the paper does."""
    seed: int = 0
    """Of the projections."""
    where: Where = ""
    """The modules whose parameters move; all of the backbone by default."""
    scope: Literal["tensor", "global"] = "tensor"
    """A map for each parameter, or one for all of them."""

    def __post_init__(self) -> None:
        require(self.dimension >= 1, self, "dimension", "1 or more")
        released = self.projection == "fastfood" and self.scope == "tensor"
        fits = self.gradient == "exact" or released
        only = "`exact` unless `projection` is `fastfood` and `scope` is `tensor`"
        require(fits, self, "gradient", only)

    @property
    def joint(self) -> bool:
        return self.scope == "global"

    def drawn(self, size: int, dimension: int, name: str) -> Projection:
        digest = hashlib.sha256(f"{self.seed} {name}".encode()).digest()
        return PROJECTIONS[self.projection](size, dimension, int.from_bytes(digest[:7], "big"))

    def chosen(self, atlas: Atlas) -> list[tuple[str, str]]:
        return backbone(atlas, self.where, self.within)

    def group(self, site: Site) -> str:
        return "all"

    def shared(self, sites: list[Site]) -> dict[str, Param]:
        count = sum(len(names_of(site)) for site in sites)
        left = self.dimension - (count if self.variant == "said" else 0)
        if left < 1:
            raise SpecError(
                f"`{self}` trains one scale for each of {count} parameters and has {left} scalars "
                f"left for the coordinates; use a `dimension` above {count}, `variant='did'`, or a "
                "narrower `where`"
            )
        return {"v": Param((left,), zeros)}

    def tensors(self, site: Site, atlas: Atlas) -> dict[str, Param]:
        one = uniform(1.0, 1.0)
        return {_scale(name): Param((), one) for name in names_of(site) if self.variant == "said"}

    @property
    def linear(self) -> bool:
        return self.variant == "did"

    def difference(self, t: Unit, name: str, value: Tensor) -> Tensor:
        assert isinstance(t, ProjectedUnit)
        projection = t.projection(name, value.numel())
        change = projection.project(t.shared.v)
        if self.gradient == "released":
            assert isinstance(projection, Fastfood)
            change = change.detach() + (change - change.detach()) / projection.padded
        if self.variant == "said":
            change = t.own(_scale(name)) * change
        return change.view(value.shape)

    def hold(self, terms: Terms, units: Mapping[str, Unit]) -> Held:
        """The changes themselves: two of SAID have no coordinates in common, of which the scales
        multiply others."""
        return Held(FullTuning(within=self.within, where=self.where), plain(terms))


def _scale(name: str) -> str:
    return f"lambda_{name}"
