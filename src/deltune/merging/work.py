"""The work of merging, part by part of the deltas."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from deltune.errors import MergeError
from deltune.mechanisms.factors import LowRank
from deltune.mechanisms.insert import Insert
from deltune.mechanisms.terms import Held
from deltune.mechanisms.unit import Mechanism, Unit
from deltune.mechanisms.weight import Weight
from deltune.merging.agreement import present, same_kept, together
from deltune.merging.algebra import Term, norm, summed, truncated
from deltune.merging.merged import Merged
from deltune.merging.saved import Part, Saved
from deltune.merging.ways import Way
from deltune.planning import named
from deltune.sites.site import Site
from deltune.spec import Spec, Sum, methods, primitives


@dataclass
class Work:
    """The merged delta, part by part."""

    deltas: Sequence[Saved]
    weights: Sequence[float]
    way: Way
    plain: bool
    factor: float
    rank: int | None
    held: list[tuple[Held, Mapping[str, Site]]] = field(default_factory=list)
    head: Mapping[str, Tensor] = field(default_factory=dict)
    head_sites: Mapping[str, Site] = field(default_factory=dict)
    scale: float = 1.0
    lost: float = 0.0
    size: float = 0.0

    @property
    def dtype(self) -> torch.dtype:
        """That of the widest of the sources' tensors."""
        dtypes = [t.dtype for delta in self.deltas for t in delta.trained.values()]
        return reduce(torch.promote_types, dtypes or [torch.float32])

    def by_terms(self, target: Spec | None) -> None:
        """Every part, in what it adds; all changes of matrices into one part if there is a target.

        Raises:
            MergeError: a part that has no sum, or a result that no method here can hold.
        """
        names = list(dict.fromkeys(name for delta in self.deltas for name in delta.parts))
        found = {name: [delta.parts.get(name) for delta in self.deltas] for name in names}
        found = {name: parts for name, parts in found.items() if not _spec(parts).owns}
        if target is None:
            for name, parts in found.items():
                self._part(name, parts)
            return
        if not isinstance(target, Weight) or type(target).hold is Mechanism.hold:
            raise MergeError(f"`{target}` cannot hold given changes of matrices; name one that can")
        matrices = {n: p for n, p in found.items() if isinstance(_spec(p), Weight)}
        if not matrices:
            raise MergeError("no part of these deltas changes matrices, so there is none for `to`")
        for name, parts in found.items():
            if name not in matrices:
                self._part(name, parts)
        self._gathered(target, matrices)

    def _part(self, name: str, parts: Sequence[Part | None]) -> None:
        """One part of all deltas, in its own method."""
        units, spec = together([[part] for part in present(parts)])
        if self.plain and spec.linear and same_kept(self.deltas, name, parts):
            self._tensors(name, units, spec, parts)
            return
        self._hold(spec, units, [[part] if part else [] for part in parts], able=True)

    def _gathered(self, target: Mechanism, found: Mapping[str, Sequence[Part | None]]) -> None:
        """All changes of matrices, summed within each delta, in one part of the target's method."""
        mine = [present([p[i] for p in found.values()]) for i in range(len(self.deltas))]
        units, spec = together(mine)
        if target.meant != type(target)().meant or target.within:
            raise MergeError(
                f"`{target}` names places, and the merged delta is where its sources are; leave "
                "`where` out"
            )
        rank = getattr(target.over(target.meant), "rank", 0)
        target = replace(target.over(spec.meant), within=spec.within)
        if target.whole and target != type(target)().over(spec.meant):
            raise MergeError(
                f"`{target.kind}` keeps all entries that are not 0; leave its options out, and "
                "choose fewer entries by `how`"
            )
        self.rank = self.rank or (None if target.whole else rank)
        bare = {key: target.unit(target, unit.site, None) for key, unit in units.items()}
        self._hold(target, bare, mine, able=False)

    def _hold(
        self, spec: Mechanism, units: Mapping[str, Unit], mine: Sequence[Sequence[Part]], able: bool
    ) -> None:
        """One place after another; where the method cannot hold what became of its changes, and
        `able` says so, one that can."""
        made: dict[str, dict[str, Term]] = {}
        for key, unit in units.items():
            each = [
                self._sum(delta, parts, key) for delta, parts in zip(self.deltas, mine, strict=True)
            ]
            made[key] = {}
            for own in dict.fromkeys(own for one in each for own in one):
                column = [one.get(own) for one in each]
                term = self.way(column, self.weights, place_of(unit, own))
                made[key][own] = self._fitted(term, spec)
        _check_rank(made)
        if isinstance(spec, Weight) and able:
            spec = _able(spec, made)
        held = spec.hold(made, units)
        self.held.append((held, {key: unit.site for key, unit in units.items()}))

    @staticmethod
    def _sum(delta: Saved, parts: Sequence[Part], key: str) -> dict[str, Term]:
        """What the parts of one delta add at a place."""
        total: dict[str, Term] = {}
        for unit in (part.units[key] for part in parts if key in part.units):
            for own, term in delta.terms(unit).items():
                total[own] = summed([total[own], term], [1.0, 1.0]) if own in total else term
        return total

    def _fitted(self, term: Term, spec: Mechanism) -> Term:
        """The term at the rank that was asked for, and what that leaves out, noted."""
        self.size += (size := norm(term) ** 2)
        matrix = isinstance(spec, Weight | Insert)
        if isinstance(spec, Weight) and spec.whole and self.rank is not None:
            raise MergeError(f"`{spec}` keeps entries and has no rank; give `to`, e.g. `lora`")
        if not isinstance(term, LowRank) and not (matrix and self.rank is not None):
            return term.to(self.dtype)
        least = min(_sides(term))
        now = term.down.shape[-2] if isinstance(term, LowRank) else least
        most = min(least, self.rank or now)
        if now > most or not isinstance(term, LowRank):
            term, lost = truncated(term, most)
            self.lost += min(lost, size) if most < least else 0.0
        return term

    def _tensors(
        self, name: str, units: Mapping[str, Unit], spec: Mechanism, parts: Sequence[Part | None]
    ) -> None:
        """A part whose effect is linear in its tensors, which are summed as they are."""
        here = [i for i, part in enumerate(parts) if part is not None]
        each = {i: self.deltas[i].below(name) for i in here}
        first = each[here[0]]
        shares = {i: self.factor * self.weights[i] * self.deltas[i].scale for i in here}
        trained = {
            own: torch.stack([shares[i] * each[i][own].double() for i in here]).sum(0)
            for own in first
        }
        kept = self.deltas[here[0]].below(name, kept=True)
        sites = {key: unit.site for key, unit in units.items()}
        self.held.append((Held(spec, trained, kept), sites))

    def from_start(self, start: Saved) -> None:
        """Every part, in its own tensors, as differences from a common start."""
        self.scale = start.scale
        for name, part in start.parts.items():
            if part.spec.owns:
                continue
            each = [delta.below(name) for delta in self.deltas]
            trained = {}
            for own, first in start.below(name).items():
                first = first.double()
                column = [one[own].double() - first for one in each]
                change = self.way(column, self.weights, f"{name}.{own}")
                assert isinstance(change, Tensor)
                trained[own] = first + change
            sites = {key: unit.site for key, unit in part.units.items()}
            self.held.append((Held(part.spec, trained, start.below(name, kept=True)), sites))

    def result(self, origin: Mapping[str, Any]) -> Merged:
        """What was made, in the dtype of the sources."""
        first, dtype = self.deltas[0], self.dtype
        specs: list[Spec] = [held.spec for held, _ in self.held]
        own = [p for p in primitives(first.spec) if isinstance(p, Mechanism) and p.owns]
        specs += own if self.head else []
        if not specs:
            raise MergeError("nothing is left of these deltas; a task head alone needs `keep_head`")
        trained, kept, sites = {}, {}, {}
        for (name, _), (held, places) in zip(named(specs), self.held, strict=False):
            trained |= {_join(name, o): t.to(dtype) for o, t in held.trained.items()}
            kept |= {_join(name, o): t for o, t in held.kept.items()}
            sites |= {_join(name, key): site for key, site in places.items()}
        trained |= {_join("head", o): t.to(dtype) for o, t in self.head.items()}
        sites |= {_join("head", key): site for key, site in self.head_sites.items()}
        same = specs == list(primitives(first.spec))
        spec = first.spec if same else specs[0] if len(specs) == 1 else Sum(tuple(specs))
        error = (self.lost / self.size) ** 0.5 if self.lost else 0.0
        return Merged(
            spec, error, trained, kept, sites, bool(self.head), self.scale, first.backbone, origin
        )


def place_of(unit: Unit, own: str) -> str:
    """The name of a place under which statistics know it: of a matrix its path, with the role's
    last word in a fused one; of another parameter its path and name."""
    site = unit.site
    return site.key if isinstance(unit.spec, Weight) else f"{site.path}.{own}".strip(".")


def _spec(parts: Sequence[Part | None]) -> Mechanism:
    return present(parts)[0].spec


def _able(spec: Weight, made: Mapping[str, Mapping[str, Term]]) -> Weight:
    """The method itself, or, of changes that have no factors left, one that keeps them whole."""
    every = [term for one in made.values() for term in one.values()]
    if spec.whole or all(isinstance(term, LowRank) for term in every):
        return spec
    able = next(m for m in methods().values() if issubclass(m, Weight) and m.whole)
    return able(where=spec.meant, within=spec.within)  # type: ignore[call-arg]


def _sides(term: Term) -> tuple[int, int]:
    if isinstance(term, LowRank):
        return term.up.shape[-2], term.down.shape[-1]
    return term.shape[-2], term.shape[-1]


def _check_rank(made: Mapping[str, Mapping[str, Term]]) -> None:
    """A method has one rank for all of its matrices, which must fit the smallest."""
    found = [(k, t) for k, one in made.items() for t in one.values() if isinstance(t, LowRank)]
    most = max((term.down.shape[-2] for _, term in found), default=0)
    for key, term in found:
        if min(_sides(term)) < most:
            raise MergeError(
                f"the merged rank {most} is above the matrix at `{key}` "
                f"({' x '.join(map(str, _sides(term)))}); give a `rank` of at most "
                f"{min(min(_sides(one)) for _, one in found)}"
            )


def _join(name: str, own: str) -> str:
    return f"{name}.{own}" if own.lstrip(".") and not own.startswith(".") else f"{name}{own}"
