"""The select mechanism: parameters of the backbone itself, changed by an owned difference.

p' = p + s d, with d of the shape of p and zero at first. A newly initialised head has no
pre-trained value to differ from: with `owns = True` the unit holds the value, p' = v.
"""

import random
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from torch import Tensor, nn
from torch.nn import functional as F

from deltune.errors import MergeError, WhereError
from deltune.mechanisms.modules import Shadow, at, pretrained
from deltune.mechanisms.tensors import Param, copy_of, zeros
from deltune.mechanisms.terms import Held, Terms, Value
from deltune.mechanisms.unit import Mechanism, Unit
from deltune.sites import quirks
from deltune.sites.discover import Atlas
from deltune.sites.matrices import reader
from deltune.sites.packed import kind, packed
from deltune.sites.site import Site
from deltune.sites.where import Where, select

if TYPE_CHECKING:
    from deltune.mechanisms.factors import LowRank

K = TypeVar("K", bound=Hashable)

Place = tuple[str, str, str, str]
"""(own tensor, module whose forward brackets the use, owner below it, parameter name)."""


TABLE = ("weight", "", "weight")
"""Of an embedding: the own tensor, the owner below the module, the parameter."""


class SelectUnit(Unit):
    """Changes of some parameters of one module, wherever the model ties them."""

    spec: "Select"

    def install(self, root: nn.Module) -> None:
        here: dict[str, list[Place]] = {}
        for place in self.site.places:
            here.setdefault(place[1], []).append(place)
        for anchor, places in here.items():
            module = at(root, anchor)
            if self._looked_up(module, places):
                self.change_output(module, self.add_rows)
                continue
            mine = tuple(places)
            self.bracket(module, partial(self.enter, mine), partial(self.leave, mine))

    def _looked_up(self, module: nn.Module, places: list[Place]) -> bool:
        """Whether the rows that are looked up can be changed in the place of the whole table, of
        which a batch reads a small part."""
        spec, unit = type(self.spec), type(self)
        plain = spec.difference is Select.difference and not self.spec.owns and self.mixer is None
        plain = plain and (unit.enter, unit._scaled) == (SelectUnit.enter, SelectUnit._scaled)
        own = [(name, inner, theirs) for name, _, inner, theirs in places]
        table = type(module) is nn.Embedding and module.max_norm is None
        return table and plain and own == [TABLE]

    def add_rows(self, module: nn.Embedding, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """W[ids] + s d[ids], which is (W + s d)[ids]."""
        change = F.embedding(
            args[0], self._scaled(TABLE[0], module.weight), module.padding_idx,
            scale_grad_by_freq=module.scale_grad_by_freq, sparse=module.sparse,
        )  # fmt: skip
        return output + change.to(output.dtype)

    def enter(self, places: tuple[Place, ...], anchor: nn.Module, args: tuple[Any, ...]) -> None:
        for name, _, inner, theirs in places:
            owner = at(anchor, inner)
            if self.spec.owns:
                Shadow.replace(owner, theirs, self.own(name))
            else:
                Shadow.cast(owner, theirs, self._scaled(name, pretrained(owner, theirs)))

    def leave(
        self, places: tuple[Place, ...], anchor: nn.Module, args: tuple[Any, ...], output: Any
    ) -> None:
        for _, _, inner, theirs in places:
            Shadow.lift(at(anchor, inner), theirs)

    def weights(self, root: nn.Module) -> Iterator[tuple[nn.Module, str, str, Tensor]]:
        for name, anchor, inner, theirs in self.site.places:
            owner = at(root, anchor).get_submodule(inner)
            value = owner._parameters[theirs]
            assert value is not None
            if self.spec.owns:
                yield owner, theirs, name, self.own(name) - value
            else:
                yield owner, theirs, name, self._scaled(name, value)

    def terms(self, value: Value) -> "dict[str, LowRank | Tensor]":
        if self.spec.owns:
            raise MergeError(f"`{self.spec.kind}` has no sum: its tensors are values, no changes")
        names = dict.fromkeys(place[0] for place in self.site.places)
        return {name: self._scaled(name, value(self.site.path, name)) for name in names}

    def _scaled(self, name: str, value: Tensor) -> Tensor:
        change = self.spec.difference(self, name, value)
        return change if self.scale == 1.0 else self.scale * change


@dataclass(frozen=True)
class Select(Mechanism):
    """A method that tunes parameters of the backbone: define `chosen`, and `tensors` with
    `difference` where the change is not simply a tensor of the parameter's shape."""

    mechanism: ClassVar[str] = "select"
    merges: ClassVar[bool] = True
    unit: ClassVar[type[Unit]] = SelectUnit

    def chosen(self, atlas: Atlas) -> list[tuple[str, str]]:
        """(module path, parameter name) of the parameters to tune, in model order."""
        raise NotImplementedError

    def difference(self, t: Unit, name: str, value: Tensor) -> Tensor:
        """The change of parameter `name`, pre-trained as `value`, from the tensors of the unit."""
        return t.own(name)

    def hold(self, terms: Terms, units: Mapping[str, Unit]) -> Held:
        """The terms themselves, where a change is simply a tensor of the parameter's shape."""
        own = type(self)
        if own.difference is not Select.difference or own.tensors is not Select.tensors:
            return super().hold(terms, units)
        return Held(self, plain(terms))

    def sites(self, atlas: Atlas) -> list[Site]:
        owners: dict[str, list[str]] = {}
        taken: set[int] = set()
        for path, name in self.chosen(atlas):
            parameter = atlas.modules[path]._parameters[name]
            if parameter is not None and packed(parameter):
                advice = (
                    "keep it out of the quantisation (`llm_int8_skip_modules` of bitsandbytes' "
                    "configuration), or attach with `head=False`"
                    if self.owns
                    else "leave it out, or use a method that acts beside the weights, such as LoRA "
                    "or an adapter"
                )
                raise WhereError(
                    f"`{self.kind}` would change `{path}.{name}` itself, which is held as "
                    f"{kind(parameter)}; {advice}"
                )
            if parameter is not None and id(parameter) not in taken:
                taken.add(id(parameter))
                owners.setdefault(path, []).append(name)
        if not owners:
            raise WhereError(f"`{self.kind}` finds no parameter of this model to tune")
        ties = tied(atlas, taken)
        about = {site.path: site for site in reversed(atlas.sites) if site.rows is None}
        return [
            Site(
                path,
                role=about[path].role if path in about else "",
                stack=about[path].stack if path in about else "",
                layer=about[path].layer if path in about else None,
                places=tuple(
                    (name, *place)
                    for name in names
                    for place in ties[id(atlas.modules[path]._parameters[name])]
                ),
            )
            for path, names in owners.items()
        ]

    def tensors(self, site: Site, atlas: Atlas) -> dict[str, Param]:
        found = {}
        for name in dict.fromkeys(place[0] for place in site.places):
            value = atlas.modules[site.path]._parameters[name]
            assert value is not None
            found[name] = Param(tuple(value.shape), copy_of(value) if self.owns else zeros)
        return found


def plain(terms: Terms) -> dict[str, Tensor]:
    """Terms that are tensors, by their names below the part."""
    pairs = ((f"{key}.{name}", term) for key, one in terms.items() for name, term in one.items())
    return {name: term for name, term in pairs if isinstance(term, Tensor)}


def backbone(atlas: Atlas, where: Where = "", within: str = "") -> list[tuple[str, str]]:
    """The backbone's parameters that a training of all would move, without the task head, of the
    modules that `where` and `within` mean; those without entries are none."""
    found = [
        (path, name)
        for path, module in atlas.modules.items()
        if not atlas.in_head(path) and not _fixed(path, atlas)
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.numel()
        if name not in quirks.UNTRAINED
    ]
    return narrowed(atlas, found, where, within)


def _fixed(path: str, atlas: Atlas) -> bool:
    """Whether a module is a table that its model computes and does not learn."""
    above, _, name = path.rpartition(".")
    table = f"{type(atlas.modules.get(above)).__name__}.{name}"
    return quirks.SINUSOIDAL in type(atlas.modules[path]).__name__ or table in quirks.TABLES


def narrowed(
    atlas: Atlas, known: list[tuple[str, str]], where: Where, within: str
) -> list[tuple[str, str]]:
    """Of these (module path, parameter name), those of the modules that `where` and `within` mean;
    all if both are empty."""
    if not where and not within:
        return known
    sites = places(atlas, [path for path, _ in known])
    kept = {site.path for site in select(atlas, where or "*", sites, within)}
    return [(path, name) for path, name in known if path in kept]


def places(atlas: Atlas, paths: Iterable[str]) -> list[Site]:
    """The sites of these modules, with a role where they have one."""
    known = dict.fromkeys(paths)
    sites = [s for s in atlas.sites if s.path in known and s.rows is None and s.kind != "sublayer"]
    there = {site.path for site in sites}
    return sites + [Site(path) for path in known if path not in there]


def fitting(sizes: Mapping[K, int], budget: int, seed: int) -> set[K]:
    """Pieces in random order, each taken if it fits into what is left of the budget."""
    order = list(sizes)
    random.Random(seed).shuffle(order)
    taken, left = set(), budget
    for piece in order:
        if sizes[piece] <= left:
            taken.add(piece)
            left -= sizes[piece]
    return taken


def tied(atlas: Atlas, wanted: set[int]) -> dict[int, list[tuple[str, str, str]]]:
    """For each wanted parameter, every place that uses it: (anchor, owner below it, name)."""
    found: dict[int, list[tuple[str, str, str]]] = {one: [] for one in wanted}
    for path, module in atlas.modules.items():
        for name, parameter in module._parameters.items():
            if id(parameter) in found:
                anchor = reader(path, atlas.modules)
                inner = path.removeprefix(anchor).lstrip(".")
                found[id(parameter)].append((anchor, inner, name))
    return found
