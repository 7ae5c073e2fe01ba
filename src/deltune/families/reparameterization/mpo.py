"""MPO: a matrix as a train of tensors, the small outer ones tuned."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import ClassVar

import torch
from torch import Tensor

from deltune.errors import AttachError, SpecError
from deltune.mechanisms import tensor_train
from deltune.mechanisms.modules import pretrained
from deltune.mechanisms.tensor_train import Factors
from deltune.mechanisms.tensors import Param
from deltune.mechanisms.unit import Rate, Unit
from deltune.mechanisms.weight import Weight
from deltune.sites.discover import Atlas
from deltune.sites.site import Site
from deltune.sites.where import Where
from deltune.spec import Family, Paper, register, require


@register
@dataclass(frozen=True)
class MPO(Weight):
    """Matrix product operators: each matrix becomes a train of tensors, the outer ones tuned.

        W' = W + s * (A_1 A_2 C A_3 A_4 - W)    (the product of a train: `mechanisms.tensor_train`)

    The n = `cores` tensors start as the decomposition of W by sequential SVDs. The central tensor C
    holds most scalars and is kept as it is; the auxiliary tensors A_k are trained. With all bonds
    the train is W at first; `bonds` cuts the smallest singular values off, and W' is then W less an
    error of at most the root of the sum of their squares.
    Trainable: the auxiliary tensors, 74,016 of 663,840 scalars for 768 x 768 and 184,720 of
    2,544,016 for 768 x 3072; 7,986,048 for all matrices of BERT-base's encoder. Merges exactly.
    C is saved with the delta: other machines may cut or sign the same singular vectors otherwise.

    Source: Liu et al., "Enabling Lightweight Fine-tuning for Pre-trained Language Model Compression
    based on Matrix Product Operators", 2021, arXiv:2106.02205.
    Differs: biases stay as they are (`mpo + bitfit` tunes them), weights do not decay, since zero
    is not the pre-trained model, and no bond is squeezed in training: `tensor_train.squeezed` makes
    the tensors for smaller `bonds` of tuned ones, `tensor_train.spectra` says what that costs. A
    matrix whose size does not factor is refused; the paper pads BERT's vocabulary with zeros.
    """

    kind: ClassVar[str] = "mpo"
    family: ClassVar[Family] = "reparameterization"
    paper: ClassVar[Paper | None] = Paper(
        "Liu et al.",
        "Enabling Lightweight Fine-tuning for Pre-trained Language Model Compression based on "
        "Matrix Product Operators", 2021, "2106.02205",
    )  # fmt: skip
    factored: ClassVar[bool] = False

    cores: int = 5
    """Number n of tensors, odd."""
    bonds: int | tuple[int, ...] | None = None
    """The most that each of the n - 1 bonds may have, one number or one for each; None for all."""
    out_factors: tuple[int, ...] | None = None
    """The n factors of a matrix's outputs; found by `tensor_train.factors` if None."""
    in_factors: tuple[int, ...] | None = None
    """The n factors of its inputs."""
    rate: float = 1.0
    """Factor on the learning rate of the auxiliary tensors."""
    where: Where = "attn, ffn"
    """The matrices to decompose."""

    def __post_init__(self) -> None:
        require(self.cores >= 3 and self.cores % 2 == 1, self, "cores", "odd, and 3 or more")
        require(self.rate > 0, self, "rate", "above 0")
        limits = (self.bonds,) if isinstance(self.bonds, int) else self.bonds or ()
        fits = not isinstance(self.bonds, tuple) or len(limits) == self.cores - 1
        whole = f"1 or more, one number or {self.cores - 1}"
        require(fits and all(limit >= 1 for limit in limits), self, "bonds", whole)
        for name in ("out_factors", "in_factors"):
            given = getattr(self, name)
            fits = given is None or (len(given) == self.cores and min(given) >= 1)
            require(fits, self, name, f"{self.cores} numbers of 1 or more")

    def tensors(self, site: Site, atlas: Atlas) -> dict[str, Param]:
        *experts, rows, columns = site.shape
        out = self._factors(site, rows, self.out_factors, rows=True)
        into = self._factors(site, columns, self.in_factors, rows=False)
        limits = self.bonds if isinstance(self.bonds, tuple) else [self.bonds] * (self.cores - 1)
        bonds = tensor_train.full_bonds(out, into, limits)
        left, right = (1, *bonds), (*bonds, 1)
        stored = pretrained(atlas.modules[site.path], site.param)
        train: dict[int, Tensor] = {}

        def start(k: int, tensor: Tensor, generator: torch.Generator | None) -> None:
            if k not in train:
                whole = site.matrix(stored).double()
                if not whole.isfinite().all():
                    raise AttachError(
                        f"`mpo` cannot decompose the matrix at `{site.path}`: it holds values that "
                        "are not finite; repair the model, or leave it out of `where`"
                    )
                train.update(enumerate(tensor_train.decompose(whole, out, into, bonds)))
            tensor.copy_(train.pop(k))

        return {
            name: Param(
                (*experts, left[k], out[k], into[k], right[k]), partial(start, k), name != "C"
            )
            for k, name in enumerate(self._names())
        }

    def rates(self) -> Mapping[str, Rate]:
        return {"A*": Rate(self.rate, decayed=False)}

    def difference(self, t: Unit, weight: Tensor) -> Tensor:
        train = [getattr(t, name) for name in self._names()]
        return tensor_train.contract(train) - t.site.matrix(weight)

    def _names(self) -> list[str]:
        """A1, A2, C, A3, A4."""
        outer = [f"A{k}" for k in range(1, self.cores)]
        return [*outer[: self.cores // 2], "C", *outer[self.cores // 2 :]]

    def _factors(self, site: Site, size: int, given: Factors | None, rows: bool) -> Factors:
        side = "out" if rows else "in"
        place = f"the matrix at `{site.path}` ({' x '.join(map(str, site.shape))})"
        if given is not None and prod(given) != size:
            raise SpecError(
                f"`mpo({side}_factors={given})`: their product is {prod(given)}, and {place} has "
                f"{size}; give factors of {size}, or none"
            )
        primes = tensor_train.primes(size)
        if given is None and len(primes) < self.cores:
            raise SpecError(
                f"`mpo(cores={self.cores})`: {place} has a side of {size}, a product of "
                f"{len(primes)} primes, too few for {self.cores} factors above 1; use fewer "
                f"`cores`, `{side}_factors` with ones among them, or leave it out of `where`"
            )
        return given or tensor_train.factors(size, self.cores, rows)
