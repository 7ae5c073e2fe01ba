"""The weight mechanism: a change of a matrix, evaluated factored where it can be.

W' = W + s * dW, with dW in factors evaluated as y + s * x dW^T on linear maps and embeddings; where
no module is called on the matrix alone (3-D expert weights, `nn.MultiheadAttention`, convolutions)
and for a dW without factors the module sees W + s * dW while its forward runs.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltune.errors import AttachError, ConversionError, MergeError, SpecError
from deltune.mechanisms.factors import (
    Drop,
    LowRank,
    Update,
    raised_each,
)
from deltune.mechanisms.gate import GatedUnit
from deltune.mechanisms.lanes import Lane, Router, in_order
from deltune.mechanisms.modules import Shadow, at, matched, pretrained
from deltune.mechanisms.streams import new_seed
from deltune.mechanisms.terms import Value
from deltune.mechanisms.unit import Mechanism, Spot, Unit
from deltune.sites.discover import Atlas
from deltune.sites.packed import check_readable
from deltune.sites.site import Site
from deltune.sites.where import Where, select
from deltune.spec import Spec

MOST = 8  # tokens of a row up to which a copy of its factors is kept from one call to the next


class Stack(NamedTuple):
    """The factors of several units at one place."""

    down: Tensor
    """A (groups, r, in); smaller ranks are filled up with zeros."""
    up: Tensor
    """B^T (groups, r, out), with s in it where that is not the same for all."""
    scale: float
    """s."""
    drops: tuple[Drop, ...] = ()
    """What each group drops."""
    which: Tensor | None = None
    """(batch): the group of each row of the batch, where the groups are not equally many rows that
    follow each other."""

    def each(self) -> "Stack":
        """The same with the rows of the batch as groups, where they are not yet."""
        if self.which is None:
            return self
        down, up = self.down[self.which], self.up[self.which]
        return self._replace(down=down, up=up, which=None)

    def raised(self, x: Tensor, output: Tensor) -> Tensor:
        """The output with the change of each group in it."""
        down, up, scale, drops, _ = self.each()
        return raised_each(x, output, down, up, scale, drops)


class WeightUnit(GatedUnit):
    """A change of one matrix."""

    spec: "Weight"

    def install(self, root: nn.Module) -> None:
        module = at(root, self.site.path)
        self.watch(root)
        if self.spec.spot(self.site, module):
            embedded = self.site.kind == "embedding"
            self.change_output(module, self.add_rows if embedded else self.add_linear)
        elif self.site.packed:
            self._beside(module)
        else:
            anchor = at(root, self.site.anchor or self.site.path)
            self.bracket(anchor, self.enter, self.leave)

    def look(self, module: nn.Module, x: Tensor) -> None:
        """Notes what the matrix reads, while its method looks at it: see `starts`."""
        moments = self.__dict__.get("moments")
        if moments is not None:
            moments.add(module, x)

    def add_linear(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        self.look(module, args[0])
        update = self.spec.update(self)
        if not self.spec.gated and not self.site.rows:
            return update.apply(args[0], self.scale, self.training, output)
        change = update.apply(args[0], self.scale, self.training)
        if self.spec.gated:
            change = (self.gate(args[0]) * change).to(output.dtype)
        return self.site.rows.add(output, change) if self.site.rows else output + change

    def add_linear_together(
        self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor,
        units: Mapping[Lane, Unit],
    ) -> Tensor | None:  # fmt: skip
        """What `add_linear` of these units gives in their rows; None where one by one is better."""
        router, x = next(iter(units)).router, args[0]
        compiling = torch.compiler.is_compiling()  # which could not tell what was written since
        keeps = not (compiling or torch.is_grad_enabled() or self.training)
        written = _written(units.values()) if keeps else None
        if written is None:
            stack = self._stacked(x, units)
            return None if stack is None else stack.raised(x, output)
        state = written, [u.scale for u in units.values()]
        key = self, x.shape[:-1]
        kept = router.kept.get(key)
        if kept is None or kept[0] != state:
            stack = self._stacked(x, units)
            few = x.numel() <= MOST * router.batch * x.shape[-1]
            kept = router.kept[key] = state, stack.each() if stack is not None and few else stack
        return None if kept[1] is None else kept[1].raised(x, output)

    def _stacked(self, x: Tensor, units: Mapping[Lane, Unit]) -> Stack | None:
        """The factors of the units; None where they cannot act at once."""
        router, changes = next(iter(units)).router, []
        plain, grouped = self._groups(x, units)
        if not plain:
            return None
        for unit in units.values():
            change = unit.spec.update(unit)  # type: ignore[attr-defined]
            if not isinstance(change, LowRank):
                return None
            changes.append(change)
        drops = self.training and any(change.dropout for change in changes)
        if drops and not grouped:
            return None
        down, up = _factors(router, changes)
        scales = tuple(c.scale * u.scale for c, u in zip(changes, units.values(), strict=True))
        same = len(set(scales)) == 1
        if not same:
            up = up * _scales(router, scales, up)
        found = Stack(down, up, scales[0] if same else 1.0)
        if grouped:
            return found._replace(drops=_drops(x, units, changes)) if drops else found
        down, up = (F.pad(t, (0, 0, 0, 0, 0, 1)) for t in (down, up))  # of no unit: zeros
        return found._replace(down=down, up=up, which=_which(router, tuple(units), x.device))

    def _groups(self, x: Tensor, units: Mapping[Lane, Unit]) -> tuple[bool, bool]:
        """Whether the units can act on all rows at once; and whether the rows of each are as many
        and follow each other."""
        router, n = next(iter(units)).router, x.shape[0]
        key = "groups", self, x.shape[:-1]
        compiling = torch.compiler.is_compiling()
        if not compiling and key in router.kept:
            return router.kept[key]
        plain = len(units) > 1 and not self.site.rows and all(map(_plain, units.values()))
        inside = [lane.index(n, x.device) for lane in units]
        found = plain, len({len(lane.rows) for lane in units}) == 1 and in_order(inside, n)
        if not compiling:
            router.kept[key] = found
        return found

    def _beside(self, module: nn.Module) -> None:
        """Acts beside a weight that cannot be seen changed, since it is held in another form."""
        if self.site.kind != "linear":
            raise AttachError(
                f"the {self.site.kind} weight at `{self.site.path}` is held in another form than "
                f"its numbers, beside which `{self.spec.kind}` cannot act; leave it out of `where`"
            )
        check_readable(module, self.site.param)
        self.change_output(module, self.add_dense)

    def add_dense(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = args[0]
        (change,) = matched(x, self.change(pretrained(module, self.site.param)))
        return output + F.linear(x, change).to(output.dtype)

    def add_rows(self, module: nn.Embedding, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        change = self.spec.update(self).rows(args[0], self.scale, module.padding_idx)
        return output + change.to(output.dtype)

    def enter(self, anchor: nn.Module, args: tuple[Any, ...]) -> None:
        owner, name = self._owner(anchor), self.site.param
        Shadow.cast(owner, name, self.change(pretrained(owner, name)))

    def leave(self, anchor: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        Shadow.lift(self._owner(anchor), self.site.param)

    def change(self, weight: Tensor) -> Tensor:
        """The change of the weight, in the shape in which it is stored."""
        delta = self.scale * self.spec.difference(self, weight)
        stored = delta.mT if self.site.transposed else delta
        if self.site.rows is None:
            return stored.reshape(weight.shape)
        whole = weight.new_zeros((), dtype=delta.dtype).expand(weight.shape)
        out_last = whole if self.site.transposed else whole.mT
        full = self.site.rows.add(out_last, delta.mT)
        return full if self.site.transposed else full.mT

    def weights(self, root: nn.Module) -> Iterator[tuple[nn.Module, str, str, Tensor]]:
        if self.spec.gated:
            raise AttachError(
                f"`{self.spec}` cannot be merged: its gate is another one for each example"
            )
        owner = at(root, self.site.path)
        yield owner, self.site.param, "", self.change(pretrained(owner, self.site.param))

    def terms(self, value: Value) -> dict[str, LowRank | Tensor]:
        spec, site = self.spec, self.site
        if spec.gated:
            raise MergeError(f"`{spec}` has no sum: its gate is another one for each example")
        if spec.factored and type(spec).difference is Weight.difference:
            update = spec.update(self)
            if isinstance(update, LowRank):
                return {site.param: update._replace(scale=update.scale * self.scale, dropout=0.0)}
            return {site.param: self.scale * update.dense()}
        return {site.param: self.scale * spec.difference(self, value(site.path, site.param))}

    def _owner(self, anchor: nn.Module) -> nn.Module:
        inner = self.site.path[len(self.site.anchor) + 1 :] if self.site.anchor else ""
        return at(anchor, inner)


def _plain(unit: Unit) -> bool:
    """Whether a unit does what `WeightUnit` does, without a gate."""
    assert isinstance(unit, WeightUnit)
    return type(unit).add_linear is WeightUnit.add_linear and not unit.spec.gated


def _written(units: Iterable[Unit]) -> list[int] | None:
    """How often each tensor of some units was written; None where one does not count that."""
    owners = [owner for u in units for owner in (u, u.shared) if owner is not None]
    tensors = [t for o in owners for t in (*o._parameters.values(), *o._buffers.values())]
    try:
        return [t._version for t in tensors if t is not None]
    except RuntimeError:  # those that inference mode has made; to ask each would take longer
        return None


def _which(router: Router, lanes: tuple[Lane, ...], device: torch.device) -> Tensor:
    """(batch): the number of each row's lane, the number of lanes where it has none."""

    def made() -> Tensor:
        numbers = [len(lanes)] * router.batch
        for number, lane in enumerate(lanes):
            for row in lane.rows:
                numbers[row] = number
        return torch.tensor(numbers, device=device)

    if torch.compiler.is_compiling():
        return made()
    key = "which", lanes, device, torch.is_inference_mode_enabled()
    if key not in router.kept:
        router.kept[key] = made()
    return router.kept[key]


def _scales(router: Router, values: tuple[float, ...], like: Tensor) -> Tensor:
    """(groups, 1, 1)."""

    def made() -> Tensor:
        return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None, None]

    if torch.compiler.is_compiling():
        return made()
    key = values, like.dtype, like.device, torch.is_inference_mode_enabled()
    if key not in router.kept:
        router.kept[key] = made()
    return router.kept[key]


def _factors(router: Router, changes: Sequence[LowRank]) -> tuple[Tensor, Tensor]:
    """A (groups, most r, in) and B^T (groups, most r, out), smaller ranks with zeros below."""
    downs, ups = [one.down for one in changes], [one.up for one in changes]
    piles = router.piles if torch.is_grad_enabled() else None
    down = None if piles is None else piles.whole(downs)
    up = None if piles is None or down is None else piles.whole(ups)
    if down is not None and up is not None:
        return down, up.mT.contiguous()  # as in `_raised`
    return _stack(downs), _stack([t.mT for t in ups])


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    """(groups, most rows, columns) of matrices, those of fewer rows with zeros below."""
    if len({len(t) for t in tensors}) == 1:
        return torch.stack(tuple(tensors))
    return nn.utils.rnn.pad_sequence(list(tensors), batch_first=True)


def _drops(x: Tensor, lanes: Mapping[Lane, Unit], changes: Sequence[LowRank]) -> tuple[Drop, ...]:
    """What the changes drop in equal groups of rows of x; all as each would draw it alone."""
    shape, found = (x.shape[0] // len(lanes), *x.shape[1:]), []
    for lane, change in zip(lanes, changes, strict=True):
        stream, seed = lane.stream, 0
        if change.dropout:
            seed = new_seed() if stream is None else stream.seed()
        own = shape if stream is None else stream.shape(shape)
        found.append(Drop(change.dropout, seed, own))
    return tuple(found)


@dataclass(frozen=True)
class Weight(Mechanism):
    """A method that changes matrices: define `where`, `tensors` and `update`; or `difference`, with
    `factored = False`, where the change has no factors."""

    mechanism: ClassVar[str] = "weight"
    merges: ClassVar[bool] = True
    unit: ClassVar[type[Unit]] = WeightUnit

    where: Where = "attn.q, attn.v"

    @property
    def factored(self) -> bool:
        """Whether the change has factors: `update` makes them."""
        return True

    def update(self, t: Unit) -> Update:
        """The change of the matrix of the unit `t`, from its tensors."""
        raise NotImplementedError

    def difference(self, t: Unit, weight: Tensor) -> Tensor:
        """The change (..., out, in) of a matrix; `t.site.matrix(weight)` is the pre-trained one."""
        return self.update(t).dense()

    def nearest(self, t: Unit, change: Tensor) -> None:
        """Sets the tensors of the unit `t` so that its change of the matrix (..., out, in) is as
        near to `change` as it can be.

        Raises:
            ConversionError: no closed form is known.
        """
        raise ConversionError(f"`{self}` has no closed form for a given change of weights")

    def sites(self, atlas: Atlas) -> list[Site]:
        return select(atlas, self.where, matrices(atlas), self.within)

    def spot(self, site: Site, module: nn.Module) -> Spot | None:
        called = site.kind in ("linear", "conv1d")
        called = called or (site.kind == "embedding" and type(module) is nn.Embedding)
        return Spot("weight", site.path) if self.factored and called else None


def matrices(atlas: Atlas) -> list[Site]:
    """Every matrix of a model that has entries."""
    return [s for s in atlas.sites if s.kind not in ("sublayer", "module") and 0 not in s.shape]


def check_rank(spec: Spec, site: Site, rank: int) -> None:
    """Refuses a rank above the matrix."""
    most = min(site.shape[-2:])
    if rank > most:
        raise SpecError(
            f"`{spec.kind}`: rank {rank} is above the matrix at `{site.path}` "
            f"({site.shape[-2]} x {site.shape[-1]}); use a rank of at most {most}"
        )
