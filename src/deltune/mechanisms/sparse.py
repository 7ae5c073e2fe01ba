"""The sparse form of select: some entries of the backbone's parameters, changed by one vector.

    p' = p + s * scatter(index, values)

p joins the chosen parameters end to end; `index` holds k rising positions in it, `values` what is
added there. Other entries have no tensor, so that no optimiser can move them. A method that picks
the positions from data leaves them at -1, which is no change, until `choose`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltune.errors import AttachError, SpecError, TrainError
from deltune.mechanisms.modules import Shadow, at
from deltune.mechanisms.select import Place, Select, SelectUnit, plain
from deltune.mechanisms.tensors import Init, Param, zeros
from deltune.mechanisms.terms import Held, Terms
from deltune.mechanisms.unit import Unit
from deltune.sites.discover import Atlas
from deltune.sites.site import Segment, Site


class Book:
    """Which part of an index falls on each parameter, looked up anew whenever it was written.

    Attributes:
        starts: first position of each parameter in the concatenation, and its length.
        edges: first entry of the index from each start on.
        open: during a forward of the model, the values and their parts, one for each parameter:
            so their gradients meet once, not once for each parameter.
    """

    def __init__(self) -> None:
        self.starts: list[int] = [0]
        self.edges: list[int] = []
        self.source: Tensor | None = None
        self.version: int | None = None
        self.open: tuple[Tensor, tuple[Tensor, ...]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A copied tensor counts its writes anew.
        return {**self.__dict__, "source": None, "open": None}

    def read(self, source: Tensor, find: Callable[[Tensor], list[int]]) -> list[int]:
        """The edges that `find` reads from `source`."""
        version = None if source.is_inference() else source._version  # those count no writes
        if source is not self.source or version is None or version != self.version:
            self.edges = find(source)
            self.source, self.version = source, version
        return self.edges


class SparseUnit(SelectUnit):
    """The selected entries of one parameter; without a segment, a parameter changed whole."""

    def __init__(self, spec: "SparseSelect", site: Site, shared: nn.Module | None) -> None:
        super().__init__(spec, site, shared)
        self.number: int
        self.probing: bool
        self.probe: Tensor | None
        self.__dict__.update(number=0, probing=False, probe=None)
        if site.segment is not None:
            book = self.shared.__dict__.setdefault("book", Book())
            self.__dict__["number"] = len(book.starts) - 1
            book.starts.append(site.segment.offset + prod(site.shape))

    def install(self, root: nn.Module) -> None:
        if self.site.segment is not None and self.number == 0:
            if not self.shared.values.is_meta:
                self.edges()
            self.before(root, self.open)
            self.after(root, self.close, always=True)
        super().install(root)

    def open(self, root: nn.Module, args: tuple[Any, ...]) -> None:
        """Takes the values apart, at the beginning of a forward."""
        values, edges = self.shared.values, self.edges()
        lengths = [high - low for low, high in pairwise(edges)]
        self.shared.book.open = values, values[edges[0] :].split(lengths)

    def close(self, root: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Lets go of the parts."""
        self.shared.book.open = None

    def enter(self, places: tuple[Place, ...], anchor: nn.Module, args: tuple[Any, ...]) -> None:
        if self.probing:
            for _, _, inner, theirs in places:
                owner = at(anchor, inner)
                Shadow.cast(owner, theirs, self._probed(owner._parameters[theirs]))
        elif not self.empty:
            super().enter(places, anchor, args)

    def weights(self, root: nn.Module) -> Iterator[tuple[nn.Module, str, str, Tensor]]:
        if not self.empty:
            yield from super().weights(root)

    def edges(self) -> list[int]:
        """Where the index crosses from one parameter to the next."""
        return self.shared.book.read(self.shared.index, self._crossings)

    def _crossings(self, index: Tensor) -> list[int]:
        _check(index, self.shared.book.starts[-1], self.spec.kind)
        starts = torch.tensor(self.shared.book.starts, dtype=index.dtype, device=index.device)
        return torch.searchsorted(index, starts).tolist()

    @property
    def empty(self) -> bool:
        """Whether no entry of this parameter is selected."""
        if self.site.segment is None:
            return False
        low, high = self._span()
        return low == high

    def part(self) -> Tensor:
        """The values of this parameter's entries."""
        low, high = self._span()
        open_, own = self.shared.book.open, self.shared.values
        return open_[1][self.number] if open_ and open_[0] is own else own[low:high]

    def spread(self, value: Tensor) -> Tensor:
        """The values at their positions in this parameter, zero elsewhere."""
        assert self.site.segment is not None
        low, high = self._span()
        part = self.part()
        places = (self.shared.index[low:high] - self.site.segment.offset).to(value.device)
        whole = torch.zeros(value.numel(), dtype=part.dtype, device=value.device)
        return whole.index_add(0, places, part.to(value.device)).view(value.shape)

    def _span(self) -> tuple[int, int]:
        book = self.shared.book
        edges = book.edges if book.open else self.edges()
        return edges[self.number], edges[self.number + 1]

    def _probed(self, value: Tensor | None) -> Tensor:
        """A zero of the parameter's shape, in one scalar's memory, that takes a gradient."""
        assert value is not None
        if self.probe is None:
            zero = torch.zeros((), dtype=self.shared.values.dtype, device=value.device)
            self.probe = zero.expand(value.shape).requires_grad_()
        return self.probe


@dataclass(frozen=True)
class SparseSelect(Select):
    """A method that tunes some entries of the backbone: define `chosen` and `kept`.

    Its tensors are `shared:all.values` (k), trained, and `shared:all.index` (k), kept.
    """

    unit: ClassVar[type[Unit]] = SparseUnit

    def kept(self, total: int, atlas: Atlas) -> int:
        """How many of the `total` entries are selected."""
        raise NotImplementedError

    def start(self, total: int) -> Init:
        """The index at first: -1, nothing is selected yet."""
        return lambda index, generator: index.fill_(-1)

    def masked(self, site: Site, atlas: Atlas) -> bool:
        """Whether entries of this module's parameters are selected; else they change whole."""
        return True

    def sites(self, atlas: Atlas) -> list[Site]:
        found: list[Site] = []
        total = 0
        for site in super().sites(atlas):
            if not self.masked(site, atlas):
                found.append(site)
                continue
            for name in dict.fromkeys(place[0] for place in site.places):
                shape = tuple(atlas.modules[site.path].get_parameter(name).shape)
                places = tuple(place for place in site.places if place[0] == name)
                segment = Segment(total, 0, 0)
                found.append(site._replace(param=name, shape=shape, places=places, segment=segment))
                total += prod(shape)
        if not total:
            return found
        kept = self.kept(total, atlas)
        if not 1 <= kept <= total:
            raise SpecError(
                f"`{self}` selects {kept:,} of the {total:,} entries that it can choose from in "
                f"{type(atlas.model).__name__}; choose 1 to {total:,}"
            )
        return [
            s if s.segment is None else s._replace(segment=Segment(s.segment.offset, total, kept))
            for s in found
        ]

    def group(self, site: Site) -> str:
        return "" if site.segment is None else "all"

    def shared(self, sites: list[Site]) -> dict[str, Param]:
        segment = sites[0].segment
        assert segment is not None
        k, dtype = (segment.kept,), torch.int64 if segment.total >= 2**31 else torch.int32
        index = Param(k, self.start(segment.total), trained=False, dtype=dtype)
        return {"values": Param(k, zeros), "index": index}

    def tensors(self, site: Site, atlas: Atlas) -> dict[str, Param]:
        return super().tensors(site, atlas) if site.segment is None else {}

    def difference(self, t: Unit, name: str, value: Tensor) -> Tensor:
        if t.site.segment is None:
            return super().difference(t, name, value)
        return t.spread(value)

    def hold(self, terms: Terms, units: Mapping[str, Unit]) -> Held:
        """The terms themselves, where parameters are changed whole."""
        own = all(type(unit.spec) is type(self) for unit in units.values())
        if own and all(unit.site.segment is None for unit in units.values()):
            return Held(self, plain(terms))
        return super().hold(terms, units)

    def note(self, units: Sequence[Unit], model: nn.Module) -> str:
        waiting = _segments(units) and not is_chosen(units)
        return "entries not chosen yet" if waiting else ""


def _check(index: Tensor, total: int, kind: str) -> None:
    flat = index.ndim == 1 and index.numel() > 0
    rising = flat and bool((index[1:] > index[:-1]).all())
    inside = rising and int(index[0]) >= 0 and int(index[-1]) < total
    if not inside and not (flat and bool((index == -1).all())):
        raise AttachError(
            f"the index of `{kind}` is damaged: expected {index.numel():,} rising positions from 0 "
            f"to {total - 1:,}, or -1 throughout; load the delta again from a whole file"
        )


def _segments(units: Iterable[Unit]) -> list[SparseUnit]:
    return [unit for unit in units if isinstance(unit, SparseUnit) and unit.site.segment]


def _first(units: Iterable[Unit]) -> SparseUnit:
    return _segments(units)[0]


def is_chosen(units: Iterable[Unit]) -> bool:
    """Whether the entries of these units were selected."""
    first = _first(units)
    return not first.shared.index.is_meta and first.edges()[0] == 0


def require_chosen(units: Sequence[Unit]) -> None:
    """Refuses to train before the entries of these units were selected."""
    if not is_chosen(units):
        raise TrainError(
            f"`{units[0].spec.kind}` is about to train before it has chosen its entries from the "
            "data; call `prepare` of `deltune.training.course.Course` before the first step"
        )


def choose(units: Sequence[Unit], losses: Iterable[Tensor], clip: float = 0.0) -> None:
    """Selects the entries with the largest sums of squared gradients over the losses; of equal
    ones, those that come first.

    Args:
        units: all of one method. What they add at a segment is left out meanwhile.
        losses: computed one by one, while this function runs.
        clip: scales the gradient of each loss to each parameter down to this norm; 0 leaves it.

    Raises:
        TrainError: all gradients are zero, or one is not finite.
    """
    index = _first(units).shared.index
    with torch.no_grad():
        sums = _squares(_segments(units), losses, clip)
        scores = torch.cat([part.flatten().to(index.device) for part in sums])
        highest = float(scores.max())
        if not 0.0 < highest < float("inf"):
            raise TrainError(
                f"`{units[0].spec.kind}` cannot choose entries: the largest sum of squared "
                f"gradients of the examples is {highest}; expected a finite number above 0; check "
                "the data and the loss, and that the delta is enabled"
            )
        least = scores.topk(len(index), sorted=False).values.min()
        above = (scores > least).nonzero().flatten()
        equal = (scores == least).nonzero().flatten()[: len(index) - len(above)]
        index.copy_(torch.cat([above, equal]).sort().values)


def _squares(units: Sequence[SparseUnit], losses: Iterable[Tensor], clip: float) -> list[Tensor]:
    sums: list[Tensor | None] = [None] * len(units)
    for unit in units:
        unit.probing = True
    try:
        with torch.enable_grad():
            for loss in losses:
                loss.backward()
                for i, probe in enumerate(unit.probe for unit in units):
                    if probe is not None and probe.grad is not None:
                        gradient, probe.grad = probe.grad, None
                        sums[i] = _added(sums[i], gradient, clip)
    finally:
        for unit in units:
            unit.probing, unit.probe = False, None
    like = units[0].shared.values
    return [
        like.new_zeros(unit.site.shape) if part is None else part
        for unit, part in zip(units, sums, strict=True)
    ]


@torch.no_grad()
def _added(sums: Tensor | None, gradient: Tensor, clip: float) -> Tensor:
    if clip:
        gradient.mul_((clip / (gradient.norm() + 1e-6)).clamp(max=1.0))
    return gradient.square_() if sums is None else sums.addcmul_(gradient, gradient)
