"""The insert mechanism: a function of the hidden state, added at a sub-layer or module.

serial    h <- h + s f(h)             h the output that goes to the residual addition
parallel  h <- h + s f(x)             x the input of the sub-layer
normed    h + a <- h + a + s f(LN(h + a))   in post-norm models: read behind the frozen norm,
                                      written before it
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from deltune.errors import AttachError
from deltune.mechanisms.unit import Mechanism, Unit, at, changed_output, first_input
from deltune.sites.discover import Atlas
from deltune.sites.site import Site
from deltune.sites.where import Where, select

Placement = Literal["serial", "parallel", "normed"]


class InsertUnit(Unit):
    """A function added at one place."""

    spec: "Insert"

    def install(self, root: nn.Module) -> None:
        site, placement = self.site, self.spec.geometry(self.site)
        self.seen: list[Tensor] = []
        if placement == "normed":
            self.before(at(root, site.norm), self.around_norm)
        elif placement == "serial":
            self.after(at(root, site.exit), self.serial)
        else:
            self.before(at(root, site.entry), self.read, kwargs=True)
            self.after(at(root, site.exit), self.write)

    def serial(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return changed_output(output, lambda h: self.added(h, h))

    def read(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.seen[:] = [first_input(args, kwargs)]

    def write(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        x = self.seen.pop()
        return changed_output(output, lambda h: self.added(h, x))

    def around_norm(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (self.added(args[0], module.forward(args[0])), *args[1:])

    def added(self, h: Tensor, x: Tensor) -> Tensor:
        """h + s f(x)."""
        change = self.spec.transform(self, x)
        return h + (change if self.scale == 1.0 else self.scale * change).to(h.dtype)


@dataclass(frozen=True)
class Insert(Mechanism):
    """A method that adds a function of the hidden state: define `where`, `tensors`, `transform`."""

    mechanism: ClassVar[str] = "insert"
    unit: ClassVar[type[Unit]] = InsertUnit

    where: Where = "attn, ffn"

    def transform(self, t: Unit, x: Tensor) -> Tensor:
        """f(x), from the tensors of the unit `t`; shape of `x`."""
        raise NotImplementedError

    def geometry(self, site: Site) -> Placement:
        """Where the function reads and writes at this site."""
        return "serial"

    def sites(self, atlas: Atlas) -> list[Site]:
        return select(atlas, self.where, layers(atlas), self.within)


def layers(atlas: Atlas) -> list[Site]:
    """The sub-layers of a model, then every module, which its name reaches."""
    found = [site for site in atlas.sites if site.role in ("attn", "ffn", "block")]
    known = {site.path for site in found}
    widths = {site.path: site.width for site in atlas.sites if site.width}
    placed = [
        site if site.exit else site._replace(entry=site.path, exit=site.path) for site in found
    ]
    return placed + [
        Site(path, entry=path, exit=path, width=widths.get(path, 0) or width_of(module))
        for path, module in atlas.modules.items()
        if path and path not in known and not isinstance(module, nn.ModuleList | nn.ModuleDict)
    ]


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


def needs_width(site: Site, kind: str) -> int:
    """The width of a site, or an error that says how to give a place with a known one."""
    if not site.width:
        raise AttachError(
            f"`{kind}` cannot tell how many features `{site.path}` puts out; "
            "choose a linear layer, a norm, a block or a sub-layer (`attn`, `ffn`)"
        )
    return site.width
