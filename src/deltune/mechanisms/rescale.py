"""The rescale mechanism: a factor for each feature that a linear map gives or is given.

output    y <- (1 + s d) (.) y       y = W x + b with the changes of weights, d (out)
input     x <- (1 + s d) (.) x       what the map and all changes of its weight read, d (in)

Both are changes of the map, W <- diag(1 + s d) W with b <- (1 + s d) (.) b, or
W <- W diag(1 + s d), and merge into it. Of a fused matrix a role's features alone are rescaled.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltune.errors import WhereError
from deltune.mechanisms.factors import LowRank
from deltune.mechanisms.modules import at, matched
from deltune.mechanisms.select import plain
from deltune.mechanisms.tensors import Param, zeros
from deltune.mechanisms.terms import Held, Terms, Value
from deltune.mechanisms.unit import Mechanism, Spot, Unit
from deltune.mechanisms.weight import matrices
from deltune.sites.discover import Atlas
from deltune.sites.packed import numbers
from deltune.sites.site import Site
from deltune.sites.where import ROLES, Where, select, terms


class RescaleUnit(Unit):
    """The factors of one linear map, on one of its sides."""

    @property
    def turn(self) -> int:
        return 2

    @property
    def reads(self) -> bool:
        return True

    def install(self, root: nn.Module) -> None:
        module = at(root, self.site.path)
        if self.site.entry:
            self.change_input(module, self.enter)
        else:
            self.change_output(module, self.leave)

    def enter(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0]
        return (x + self._change(x) * x, *args[1:])

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        rows = self.site.rows
        if rows is None:
            return output + self._change(output) * output
        return rows.add(output, self._change(output) * rows.take(output))

    def weights(self, root: nn.Module) -> Iterator[tuple[nn.Module, str, str, Tensor]]:
        owner, site = at(root, self.site.path), self.site
        weight, bias = (
            numbers(owner, owner._parameters.get("weight")),
            owner._parameters.get("bias"),
        )
        wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
        factors = self.scale * self.d.detach()
        if not site.entry:
            factors = site.spread(factors, weight)
        along_rows = site.transposed == bool(site.entry)
        yield owner, "weight", "weight", wide * (factors[:, None] if along_rows else factors)
        if bias is not None and not site.entry:
            yield owner, "bias", "bias", factors * bias.detach().to(wide.dtype)

    def terms(self, value: Value) -> dict[str, LowRank | Tensor]:
        """s d: the change of the map is linear in it."""
        return {"d": self.scale * self.d}

    def _change(self, like: Tensor) -> Tensor:
        (d,) = matched(like, self.d)
        return (d if self.scale == 1.0 else self.scale * d).to(like.dtype)


@dataclass(frozen=True)
class Rescaling(Mechanism):
    """A method that rescales features of linear maps: define `where` and `inputs`."""

    mechanism: ClassVar[str] = "rescale"
    merges: ClassVar[bool] = True
    unit: ClassVar[type[Unit]] = RescaleUnit

    where: Where = "attn.k, attn.v, ffn.down"
    inputs: str = "ffn.down"
    """Of these maps, those whose input is rescaled; '' for none. A role that the model lacks is
    none; another name has to be there."""

    def sites(self, atlas: Atlas) -> list[Site]:
        """The maps, with an `entry` where their input is meant."""
        candidates = matrices(atlas)
        found = select(atlas, self.where, candidates, self.within)
        called = [site for site in found if site.kind in ("linear", "conv1d")]
        if len(called) < len(found):
            odd = next(site for site in found if site.kind not in ("linear", "conv1d"))
            raise WhereError(
                f"`{self.kind}` rescales what linear maps give and are given, and nothing calls "
                f"the matrix at `{odd.path}` alone; leave it out of `where`, or use LoRA"
            )
        here = {site.role for site in candidates}
        asked = [
            term
            for term in (terms(self.inputs) if self.inputs else ())
            if term not in ROLES or any(f"{role}.".startswith(f"{term}.") for role in here)
        ]
        read = set(select(atlas, ", ".join(asked), candidates)) if asked else set()
        return [site._replace(entry=site.path) if site in read else site for site in called]

    def spot(self, site: Site, module: nn.Module) -> Spot:
        return Spot("input" if site.entry else "output", site.path)

    def tensors(self, site: Site, atlas: Atlas) -> dict[str, Param]:
        return {"d": Param((site.shape[-1 if site.entry else -2],), zeros)}

    def hold(self, terms: Terms, units: Mapping[str, Unit]) -> Held:
        return Held(self, plain(terms))
