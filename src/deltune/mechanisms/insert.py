"""The insert mechanism: a function of the hidden state, added at a sub-layer or module.

serial    h <- h + s f(h)             h the output that goes to the residual addition
parallel  h <- h + s f(x)             x the input of the sub-layer
normed    h + a <- h + a + s f(LN(h + a))   in post-norm models: read behind the frozen norm,
                                      written before it

A linear f of the output h = W g + b, or of its g, is a change of W and b, and merges into them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from deltune.errors import AttachError
from deltune.mechanisms.factors import LowRank
from deltune.mechanisms.gate import GatedUnit
from deltune.mechanisms.modules import at, changed_output, first_input
from deltune.mechanisms.terms import Value
from deltune.mechanisms.unit import Mechanism, Spot, Unit
from deltune.sites.discover import Atlas
from deltune.sites.matrices import matrix, reader
from deltune.sites.packed import numbers
from deltune.sites.site import Site
from deltune.sites.where import Where, select
from deltune.spec import Spec, require

Placement = Literal["serial", "parallel", "normed"]


class InsertUnit(GatedUnit):
    """A function added at one place."""

    spec: "Insert"
    bares: ClassVar[bool] = True

    @property
    def turn(self) -> int:
        at_exit = self.site.exit != self.site.last
        return 5 if self.placed == "normed" else 1 + 2 * at_exit + self.reads

    @property
    def reads(self) -> bool:
        return self.placed != "parallel"

    @property
    def stream(self) -> set[str]:
        inside = self.site.last.startswith(f"{self.site.exit}.")
        return {self.site.last} if inside else {self.site.last, self.site.exit} - {""}

    @property
    def placed(self) -> Placement:
        """Where it reads and writes."""
        return self.spec.geometry(self.site)

    @property
    def rests(self) -> bool:
        """Whether a step of training leaves the unit out."""
        return self.training and self.__dict__.get("dropped", False)

    def install(self, root: nn.Module) -> None:
        site, placement = self.site, self.placed
        self.seen: list[Tensor] = []
        self.watch(root)
        if placement == "normed":
            self.change_input(at(root, site.norm), self.around_norm)
        elif placement == "serial":
            self.change_output(at(root, site.exit), self.serial)
        else:
            self.before(at(root, site.entry), self.read, kwargs=True)
            self.change_output(at(root, site.exit), self.write)

    def serial(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return changed_output(output, lambda h: self.added(h, h))

    def read(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.seen[:] = [self.mine(first_input(args, kwargs))]

    def write(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        x = self.seen.pop()
        return changed_output(output, lambda h: self.added(h, x))

    def around_norm(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if self.rests:
            return (self.added(args[0], args[0]), *args[1:])
        return (self.added(args[0], self.ran(module, args[0])), *args[1:])

    def added(self, h: Tensor, x: Tensor) -> Tensor:
        """h + s f(x), or s f(x) alone."""
        if self.rests:
            return torch.zeros_like(h) if self.bare else h
        change = self.spec.transform(self, x)
        if self.spec.gated:
            change = self.gate(x) * change
        change = change if self.scale == 1.0 else self.scale * change
        change = change.to(h.dtype).reshape(h.shape)  # rows may have been put one behind another
        return change if self.bare else h + change

    def terms(self, value: Value) -> dict[str, LowRank | Tensor]:
        found = None if self.spec.gated else self.spec.factors(self)
        if found is None:
            return super().terms(value)
        return {"": found._replace(scale=found.scale * self.scale)}

    def weights(self, root: nn.Module) -> Iterator[tuple[nn.Module, str, str, Tensor]]:
        if not self.spec.merges or self.spec.gated:
            yield from super().weights(root)
        if not self.site.last:
            raise AttachError(
                f"`{self.spec.kind}` cannot be merged: what it changes at `{self.site.path}` is "
                "not the output of one linear map"
            )
        owner = at(root, self.site.last)
        stored, bias = numbers(owner, owner._parameters.get("weight")), owner._parameters["bias"]
        dtype = torch.promote_types(stored.dtype, torch.float32)
        flipped = bool(matrix(self.site.last, owner).get("transposed"))
        weight = stored.detach().to(dtype)
        change, shift = self.spec.fused(
            self,
            weight.mT if flipped else weight,
            None if bias is None else bias.detach().to(dtype),
        )
        if shift is not None and bias is None:
            raise AttachError(
                f"`{self.spec.kind}` cannot be merged: it shifts the output of `{self.site.last}`, "
                "which has no bias to take that"
            )
        yield owner, "weight", "weight", self.scale * (change.mT if flipped else change)
        if shift is not None:
            yield owner, "bias", "bias", self.scale * shift


@dataclass(frozen=True)
class Insert(Mechanism):
    """A method that adds a function of the hidden state: define `where`, `tensors`, `transform`,
    and `fused` with `merges = True` where the function is linear."""

    mechanism: ClassVar[str] = "insert"
    unit: ClassVar[type[Unit]] = InsertUnit

    where: Where = "attn, ffn"
    robust: bool = field(default=False, kw_only=True)
    """AdapterDrop: each step of training leaves out the layers below a random one."""

    def transform(self, t: Unit, x: Tensor) -> Tensor:
        """f(x), from the tensors of the unit `t`; shape of `x`."""
        raise NotImplementedError

    def factors(self, t: Unit) -> LowRank | None:
        """The map (d, d) of a linear f without a shift, in factors."""
        return None

    def fused(self, t: Unit, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """A linear f as changes of the weight (out, in) and bias of the map whose output it
        changes; None for a bias that does not change."""
        raise NotImplementedError

    @property
    def demands(self) -> bool:
        return self.robust

    def before_step(self, units: Sequence[Unit], step: int, steps: int, seed: int) -> None:
        if self.robust:
            drop_layers(units, seed)

    def after_step(self, units: Sequence[Unit], step: int, steps: int) -> None:
        for unit in units:
            unit.__dict__.pop("dropped", None)

    def geometry(self, site: Site) -> Placement:
        """Where the function reads and writes at this site."""
        return "serial"

    def sites(self, atlas: Atlas) -> list[Site]:
        return select(atlas, self.where, layers(atlas), self.within)

    def spot(self, site: Site, module: nn.Module) -> Spot:
        normed = self.geometry(site) == "normed"
        return Spot("input", site.norm) if normed else Spot("output", site.exit)

    def check_entry(self, site: Site, atlas: Atlas) -> None:
        """Refuses a module that puts out another number of features than is read before it."""
        module = atlas.modules[site.path]
        if site.entry != site.exit or not (linear(module) or isinstance(module, nn.Embedding)):
            return
        into = matrix(site.path, module)["shape"][-1] if linear(module) else 0
        if into != site.width:
            raise AttachError(
                f"`{self.kind}` would read {f'{into} features' if into else 'token ids'} before "
                f"`{site.path}` and change the {site.width} features behind it; choose a place "
                "that keeps the width, or a placement that reads behind it"
            )


def drop_layers(units: Sequence[Unit], seed: int) -> None:
    """Lets the units below layer k rest, with k uniform from 0 to L - 1 for the L layers of each
    stack: one draw u for all stacks, k = floor(u L)."""
    draw = torch.rand((), generator=torch.Generator().manual_seed(seed)).item()
    inside = [(unit, unit.site.layer) for unit in units if unit.site.layer is not None]
    if not inside:
        raise AttachError(
            f"`{units[0].spec}` leaves out layers in training and acts in none; choose places in "
            "the layers, or leave `robust` out"
        )
    counts: dict[str, int] = {}
    for unit, layer in inside:
        counts[unit.site.stack] = max(counts.get(unit.site.stack, 0), layer + 1)
    for unit, layer in inside:
        unit.__dict__["dropped"] = layer < int(draw * counts[unit.site.stack])


def layers(atlas: Atlas) -> list[Site]:
    """The sub-layers of a model, then every module, which its name reaches."""
    found = [site for site in atlas.sites if site.role in ("attn", "ffn", "block")]
    known = {site.path for site in found}
    widths = {site.path: site.width for site in atlas.sites if site.width}
    placed = [
        site if site.exit else site._replace(entry=site.path, exit=site.path) for site in found
    ]
    return placed + [
        Site(
            path,
            entry=path,
            exit=path,
            width=widths.get(path, 0) or width_of(module),
            last=path if linear(module) else "",
        )
        for path, module in atlas.modules.items()
        if path and path not in known and not isinstance(module, nn.ModuleList | nn.ModuleDict)
        if reader(path, atlas.modules) == path
    ]


def linear(module: nn.Module) -> bool:
    """Whether a module is a linear map."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def width_of(module: nn.Module) -> int:
    """The number of features that a module puts out, as far as its own structure tells; else 0."""
    if isinstance(module, nn.Linear):
        return module.out_features
    if isinstance(module, nn.Embedding):
        return module.embedding_dim
    weight = module._parameters.get("weight")
    if weight is not None and weight.ndim == 1:
        return weight.shape[0]
    last = next(reversed(module._modules.values()), None) if module._modules else None
    return width_of(last) if isinstance(module, nn.Sequential) and last is not None else 0


def check_bottleneck(spec: Spec, width: int | None, reduction: float | None) -> None:
    """Refuses a bottleneck that is none, or that is given twice."""
    require(width is None or width >= 1, spec, "width", "1 or more")
    require(reduction is None or reduction >= 1, spec, "reduction", "1 or more")
    require(
        width is None or reduction is None, spec, "reduction", "left out where `width` is given"
    )


def bottleneck(d: int, width: int | None, reduction: float) -> int:
    """The bottleneck of `d` features: `width`, or d / reduction, rounded down to 1 or more."""
    return width or max(1, int(d / reduction))


def needs_width(site: Site, kind: str) -> int:
    """The width of a site, or an error that says how to give a place with a known one."""
    if not site.width:
        raise AttachError(
            f"`{kind}` cannot tell how many features `{site.path}` puts out; "
            "choose a linear layer, a norm, a block or a sub-layer (`attn`, `ffn`)"
        )
    return site.width
