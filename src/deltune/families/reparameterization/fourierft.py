"""FourierFT: a few coefficients of the spectrum of a change."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from deltune.errors import SpecError
from deltune.mechanisms.projections import Selection
from deltune.mechanisms.tensors import Param, normal, wide, zeros
from deltune.mechanisms.unit import Unit
from deltune.mechanisms.weight import Weight, WeightUnit
from deltune.sites.discover import Atlas
from deltune.sites.site import Site
from deltune.sites.where import Where
from deltune.spec import Family, Paper, register, require


class SpectralUnit(WeightUnit):
    """A change of one matrix, with the places of its coefficients."""

    def __init__(self, spec: "FourierFT", site: Site, shared: nn.Module | None) -> None:
        super().__init__(spec, site, shared)
        *_, out, into = site.shape
        self.places: Selection
        self.__dict__["places"] = Selection(out * into, spec.frequencies, spec.seed)


@register
@dataclass(frozen=True)
class FourierFT(Weight):
    """A change of each chosen matrix that has a few coefficients in its spectrum.

        y = x W^T + b + s * x (alpha Re(IDFT(F)))^T,    F = scatter(p, c)

    with c (n) trained, n = `frequencies`, at places p of the spectrum F (out, in), which is zero
    elsewhere; IDFT is the inverse discrete Fourier transform in two dimensions, with its factor
    1 / (out in). The places are the first n of a random order that `seed` draws, the same for all
    matrices of a shape, and no file holds them. c ~ N(0, 1) at first, so the model starts changed;
    with `init="zero"` it does not.
    Trainable: n for each matrix, whatever its size. Merges exactly.

    Source: Gao et al., "Parameter-Efficient Fine-Tuning with Discrete Fourier Transform", 2024,
    arXiv:2405.03003.
    Differs: the places are uniform, without the option to prefer low frequencies. The roles of a
    fused matrix have a spectrum each, and so has each of stored 3-D experts.
    """

    kind: ClassVar[str] = "fourierft"
    family: ClassVar[Family] = "reparameterization"
    paper: ClassVar[Paper | None] = Paper(
        "Gao et al.", "Parameter-Efficient Fine-Tuning with Discrete Fourier Transform", 2024,
        "2405.03003",
    )  # fmt: skip
    checked: ClassVar[str] = "PEFT 0.21.2: equal outputs"
    unit: ClassVar[type[Unit]] = SpectralUnit
    factored: ClassVar[bool] = False

    frequencies: int = 1000
    """Number of coefficients n of each matrix."""
    alpha: float = 150.0
    """Factor on the change."""
    init: Literal["normal", "zero"] = "normal"
    """The coefficients at first: N(0, 1), or 0."""
    seed: int = 777
    """Of the places."""
    where: Where = "attn.q, attn.v"
    """The matrices to adapt."""

    def __post_init__(self) -> None:
        require(self.frequencies >= 1, self, "frequencies", "1 or more")
        require(self.alpha != 0.0, self, "alpha", "other than 0")

    def tensors(self, site: Site, atlas: Atlas) -> dict[str, Param]:
        (*experts, out, into), n = site.shape, self.frequencies
        if n > out * into:
            raise SpecError(
                f"`fourierft(frequencies={n})`: the spectrum of the {out} x {into} matrix at "
                f"`{site.path}` has {out * into} places; use at most as many, or leave it out of "
                "`where`"
            )
        return {"c": Param((*experts, n), normal(1.0) if self.init == "normal" else zeros)}

    @property
    def linear(self) -> bool:
        return True

    def difference(self, t: Unit, weight: Tensor) -> Tensor:
        spectrum = t.places.project(wide(t.c)).unflatten(-1, t.site.shape[-2:])
        return self.alpha * torch.fft.ifft2(spectrum).real
