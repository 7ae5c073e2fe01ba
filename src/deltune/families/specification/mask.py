"""Mask: a fixed choice of which pre-trained weights stay."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from deltune.errors import WhereError
from deltune.mechanisms.binary import Masked, bits_of, unpack
from deltune.mechanisms.tensors import Param, constant
from deltune.mechanisms.unit import Unit
from deltune.sites.discover import Atlas
from deltune.sites.site import Site
from deltune.sites.where import Where, select
from deltune.spec import Family, Paper, register, require


@register
@dataclass(frozen=True)
class Mask(Masked):
    """A fixed binary mask on pre-trained matrices: what `masking` folds to.

        W' = W + s (M (.) W - W),    M in {0, 1}, of the shape of W

    Nothing is trained; M is kept as one bit for each entry (`<parameter>:bits`): 8.92 MB for the
    71,368,704 entries in BERT-base. Attached afresh, M is all ones. Merges exactly.

    Source: Zhao et al., "Masking as an Efficient Alternative to Finetuning for Pretrained Language
    Models", 2020, arXiv:2004.12406.
    """

    kind: ClassVar[str] = "mask"
    trains: ClassVar[bool] = False
    family: ClassVar[Family] = "specification"
    paper: ClassVar[Paper | None] = Paper(
        "Zhao et al.", "Masking as an Efficient Alternative to Finetuning for Pretrained Language "
        "Models", 2020, "2004.12406",
    )  # fmt: skip

    where: Where = ""
    """The matrices; by default those of attention and feed-forward in all blocks but the lowest
    `skip` of each stack, and the pooler's."""
    skip: int = 2
    """Lowest blocks of each stack that stay whole where `where` does not say."""

    def __post_init__(self) -> None:
        require(self.skip >= 0, self, "skip", "0 or more")

    def chosen(self, atlas: Atlas) -> list[tuple[str, str]]:
        if self.where:
            return super().chosen(atlas)
        found = [site for site in self.candidates(atlas) if not atlas.in_head(site.path)]
        inner = [site for site in found if site.role.startswith(("attn", "ffn"))]
        blocks: dict[str, int] = {}
        for site in inner:
            blocks[site.stack] = max(blocks.get(site.stack, 0), (site.layer or 0) + 1)
        low = [f"{n} in `{stack}`" for stack, n in blocks.items() if n <= self.skip]
        if low or not blocks:
            raise WhereError(
                f"`{self}` leaves the lowest {self.skip} blocks of each stack whole, and "
                f"{type(atlas.model).__name__} has {', '.join(low) or 'no blocks'}; use a smaller "
                "`skip`, or name the matrices in `where`"
            )
        kept = [
            site
            for site in found
            if (site in inner and (site.layer or 0) >= self.skip)
            or "pooler" in site.path.split(".")
        ]
        return [(site.path, site.param) for site in select(atlas, "*", kept, self.within)]

    def tensors(self, site: Site, atlas: Atlas) -> dict[str, Param]:
        return {
            f"{name}:bits": bits_of(param.shape, constant(255))
            for name, param in super().tensors(site, atlas).items()
        }

    def mask(self, t: Unit, name: str, shape: Sequence[int]) -> Tensor:
        return unpack(getattr(t, f"{name}:bits"), shape)

    def difference(self, t: Unit, name: str, value: Tensor) -> Tensor:
        return (-value).masked_fill(self.mask(t, name, value.shape), 0.0)
