"""DoRA: low-rank adaptation of the directions of a matrix's rows, and their magnitudes."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltune.errors import ConversionError
from deltune.families.reparameterization.lora import LoRA
from deltune.mechanisms.factors import dropped_linear
from deltune.mechanisms.magnitude import Rescaled, per_norm, row_norms
from deltune.mechanisms.modules import matched, pretrained
from deltune.mechanisms.tensors import Param
from deltune.mechanisms.terms import Held, Terms
from deltune.mechanisms.unit import Mechanism, Unit
from deltune.mechanisms.weight import WeightUnit
from deltune.sites.discover import Atlas
from deltune.sites.site import Site
from deltune.spec import Family, Paper, register, require


class DirectedUnit(WeightUnit):
    """A change of one matrix that rescales what the matrix gives."""

    def add_linear(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        (x, *_), rows, bias, spec = args, self.site.rows, None, self.spec
        assert isinstance(spec, DoRA)
        self.look(module, x)
        weight = self.site.matrix(pretrained(module, "weight"))
        if module._parameters.get("bias") is not None:
            bias = pretrained(module, "bias")
            bias = rows.take(bias) if rows else bias
        alone = self.alone(module)
        given = rows.take(output) if rows else output
        if not alone:
            given = F.linear(x, weight.to(x.dtype), bias)
        change = spec.update(self)
        down, up, r = matched(given, change.down, change.up, spec.ratio(self, weight))
        hidden = dropped_linear(x, down, spec.dropout if self.training else 0.0)
        up = (up * change.scale).to(hidden.dtype)
        made = Rescaled.apply(given, hidden, up, r.to(given.dtype), bias)
        if alone and rows is None and self.scale == 1.0:
            return made
        moved = self.scale * (made - given)
        return rows.add(output, moved) if rows else output + moved

    def add_rows(self, module: nn.Embedding, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        ids, weight, padding = args[0], pretrained(module, "weight"), module.padding_idx
        given = output if self.alone(module) else F.embedding(ids, weight, padding)
        spec = self.spec
        assert isinstance(spec, DoRA)
        moved = given + spec.update(self).rows(ids, 1.0, padding)
        change = self.scale * (spec.ratio(self, weight.mT) * moved - given)
        return output + change.to(output.dtype)


@register
@dataclass(frozen=True)
class DoRA(LoRA):
    """Weight-decomposed low-rank adaptation: the magnitude of each row of a matrix is trained, and
    its direction by a product of two thin matrices.

        y = x W'^T + b,    W'_i = m_i (W + s B A)_i / ||(W + s B A)_i||,    s = alpha / r

    (s = alpha / sqrt(r) with `scaling="root"`) for each row i, one for each output feature, with
    A (r, in), B (out, r) and m (out) trained; B = 0 and m_i = ||W_i|| at first, so the model starts
    unchanged. The norm is a constant to the gradient. Trainable: the sum over matrices of
    r (in + out) + out. Merges exactly.

    Source: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", 2024, arXiv:2402.09353, eq. 5
    and section 4.3 (the constant norm).
    Differs: dropout acts on the input of A alone, also in training; PEFT then drops the input of W
    for the part that m rescales. A row of W that is 0 stays 0. The norm is computed from W A^T and
    A A^T, without B A.
    """

    kind: ClassVar[str] = "dora"
    family: ClassVar[Family] = "reparameterization"
    paper: ClassVar[Paper | None] = Paper(
        "Liu et al.", "DoRA: Weight-Decomposed Low-Rank Adaptation", 2024, "2402.09353"
    )
    checked: ClassVar[str] = "PEFT 0.21.2: equal outputs and gradients"
    unit: ClassVar[type[Unit]] = DirectedUnit

    def __post_init__(self) -> None:
        super().__post_init__()
        require(not self.gate, self, "gate", "False: rows of a changing norm have no one scale")

    def tensors(self, site: Site, atlas: Atlas) -> dict[str, Param]:
        def start(tensor: Tensor, generator: torch.Generator | None) -> None:
            weight = site.matrix(pretrained(atlas.modules[site.path], site.param))
            tensor.copy_(torch.linalg.vector_norm(weight, dim=-1, dtype=tensor.dtype))

        return super().tensors(site, atlas) | {"m": Param(site.shape[:-1], start)}

    def ratio(self, t: Unit, weight: Tensor) -> Tensor:
        """m_i / ||(W + s B A)_i||, shape (..., out)."""
        norms = row_norms(weight, *self.update(t)[:3])
        return per_norm(t.m, norms.to(t.m.dtype))

    def difference(self, t: Unit, weight: Tensor) -> Tensor:
        own = t.site.matrix(weight)
        wide = own.to(torch.promote_types(own.dtype, t.m.dtype))
        return self.ratio(t, own)[..., None] * (wide + self.update(t).dense()) - wide

    def hold(self, terms: Terms, units: Mapping[str, Unit]) -> Held:
        return Mechanism.hold(self, terms, units)

    def nearest(self, t: Unit, change: Tensor) -> None:
        raise ConversionError(f"`{self}` has no closed form for a given change of weights")
