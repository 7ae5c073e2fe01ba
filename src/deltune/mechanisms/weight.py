"""The weight mechanism: a change of a matrix, evaluated factored where it can be.

W' = W + s * dW, with dW in factors evaluated as y + s * x dW^T on linear maps and embeddings; where
no module is called on the matrix alone (3-D expert weights, `nn.MultiheadAttention`, convolutions)
and for a dW without factors the module sees W + s * dW while its forward runs.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltune.errors import AttachError, ConversionError, SpecError
from deltune.mechanisms.gate import GatedUnit
from deltune.mechanisms.lanes import Lane, in_order
from deltune.mechanisms.unit import Mechanism, Shadow, Spot, Unit, at, matched, pretrained
from deltune.sites.discover import Atlas
from deltune.sites.site import Site
from deltune.sites.where import Where, select
from deltune.spec import Spec

MOST = 8  # tokens of a row up to which a copy of its factors costs less than its own products


class Update(Protocol):
    """dW in factors."""

    def dense(self) -> Tensor:
        """dW, shape (..., out, in)."""
        ...

    def apply(self, x: Tensor, scale: float, training: bool, onto: Tensor | None = None) -> Tensor:
        """scale * x dW^T, added to `onto` if that is given."""
        ...

    def rows(self, ids: Tensor, scale: float, padding: int | None) -> Tensor:
        """scale * dW^T[ids]: the change of embeddings, without a gradient from `padding`."""
        ...


class LowRank(NamedTuple):
    """dW = scale * up @ down, with dropout on the input of `down` in training."""

    down: Tensor
    up: Tensor
    scale: float
    dropout: float = 0.0

    def dense(self) -> Tensor:
        """dW, shape (..., out, in)."""
        return self.scale * (self.up @ self.down)

    def apply(self, x: Tensor, scale: float, training: bool, onto: Tensor | None = None) -> Tensor:
        """scale * x dW^T, added to `onto` if that is given."""
        down, up = matched(x, self.down, self.up)
        hidden = dropped_linear(x, down, self.dropout if training else 0.0)
        up = up * (self.scale * scale)
        return _raised(hidden, up) if onto is None else _raised_onto(onto, hidden, up)

    def rows(self, ids: Tensor, scale: float, padding: int | None) -> Tensor:
        """scale * dW^T[ids], without a gradient from `padding`."""
        hidden = F.embedding(ids, self.down.mT, padding)
        return _raised(hidden, self.up * (self.scale * scale))


class DroppedLinear(torch.autograd.Function):
    """F.linear(dropout(x, p), weight); keeps x and a seed for backward, no mask and no copy."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, p: float, seed: int) -> Tensor:
        return F.linear(x * _mask(x, p, seed), weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, ctx.p, ctx.seed = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (grad,), (x, weight) = grads, ctx.saved_tensors
        mask = _mask(x, ctx.p, ctx.seed)
        dx = (grad @ weight) * mask if ctx.needs_input_grad[0] else None
        dw = None
        if ctx.needs_input_grad[1]:
            dw = grad.reshape(-1, grad.shape[-1]).mT @ (x * mask).reshape(-1, x.shape[-1])
        return dx, dw, None, None


def _mask(x: Tensor, p: float, seed: int) -> Tensor:
    """0 where x is dropped, else 1 / (1 - p), with p to the nearest 2^-16.

    16 random bits decide for each element, four of them from one draw: a third of the time of
    `bernoulli_`, which is most of what dropout costs.
    """
    generator = torch.Generator(x.device).manual_seed(seed)
    draws = (-(-x.numel() // 4),)
    bits = torch.randint(-(2**63), 2**63 - 1, draws, generator=generator, device=x.device)
    dropped = min(round(p * 2**16), 2**16 - 1)
    keep = bits.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - 2**15
    return keep.to(x.dtype).mul_(2**16 / (2**16 - dropped))


def dropped_linear(x: Tensor, weight: Tensor, p: float) -> Tensor:
    """F.linear(dropout(x, p), weight); nothing but `x` itself is kept for backward.

    The seed of the mask is drawn from torch's global generator, so that seeding and gradient
    checkpointing work as for `nn.Dropout`.
    """
    if p == 0.0:
        return F.linear(x, weight)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    seed = int(torch.randint(2**62, (), dtype=torch.int64))
    return DroppedLinear.apply(x, weight, p, seed)


def _raised(hidden: Tensor, up: Tensor) -> Tensor:
    """F.linear(hidden, up), on a copy of `up` the other way round: with a rank of a few the matrix
    products of backward are several times faster in that layout."""
    return hidden @ up.mT.contiguous()


def _raised_onto(output: Tensor, hidden: Tensor, up: Tensor) -> Tensor:
    """output + F.linear(hidden, up) in one pass over the memory of the output."""
    flat = output.reshape(-1, output.shape[-1])
    added = torch.addmm(flat, hidden.reshape(-1, hidden.shape[-1]), up.mT.contiguous())
    return added.view(output.shape)


def _raised_each(x: Tensor, output: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """output + x A^T B^T with another A (groups, r, in) and B^T (groups, r, out) for each of equal
    groups of rows."""
    down, up = matched(x, down, up)
    hidden = torch.bmm(x.reshape(len(down), -1, x.shape[-1]), down.mT)
    flat = output.reshape(len(down), -1, output.shape[-1])
    return torch.baddbmm(flat, hidden, up.to(hidden.dtype)).view(output.shape)


class WeightUnit(GatedUnit):
    """A change of one matrix."""

    spec: "Weight"

    def install(self, root: nn.Module) -> None:
        module = at(root, self.site.path)
        self.watch(root)
        if self.spec.spot(self.site, module):
            embedded = self.site.kind == "embedding"
            self.change_output(module, self.add_rows if embedded else self.add_linear)
        else:
            anchor = at(root, self.site.anchor or self.site.path)
            self.bracket(anchor, self.enter, self.leave)

    def add_linear(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
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
        owners = [owner for u in units.values() for owner in (u, u.shared) if owner is not None]
        tensors = [t for o in owners for t in (*o._parameters.values(), *o._buffers.values())]
        state = [t._version for t in tensors if t is not None], [u.scale for u in units.values()]
        key, kept = (self, x.shape[:-1]), None
        if not torch.is_grad_enabled() and not self.training:
            kept = router.kept.get(key)
        if kept is None or kept[0] != state:
            kept = state, self._stacked(x, units)
            if not torch.is_grad_enabled() and not self.training:
                router.kept[key] = kept
        return None if kept[1] is None else _raised_each(x, output, *kept[1])

    def _stacked(self, x: Tensor, units: Mapping[Lane, Unit]) -> tuple[Tensor, Tensor] | None:
        """A (groups, r, in) and s B^T (groups, r, out) of equal groups of rows: those of each unit,
        or each row alone; smaller ranks are filled up with zeros."""
        router, n, changes = next(iter(units)).router, x.shape[0], []
        for unit in units.values():
            assert isinstance(unit, WeightUnit)
            change = unit.spec.update(unit)
            plain = type(unit).add_linear is WeightUnit.add_linear and not unit.spec.gated
            if not plain or self.site.rows or not isinstance(change, LowRank):
                return None
            if change.dropout and self.training:
                return None
            changes.append(change._replace(scale=change.scale * unit.scale))
        inside = [lane.index(n, x.device) for lane in units]
        grouped = len({len(lane.rows) for lane in units}) == 1 and in_order(inside, n)
        few = x.numel() <= MOST * router.batch * x.shape[-1]
        if len(changes) < 2 or not (grouped or few):
            return None
        most = max(len(one.down) for one in changes)
        pads = [(0, 0, 0, most - len(one.down)) for one in changes]
        pairs = list(zip(changes, pads, strict=True))
        down = torch.stack([F.pad(one.down, pad) for one, pad in pairs])
        up = torch.stack([F.pad(one.up.mT * one.scale, pad) for one, pad in pairs])
        if not grouped:
            which = torch.full((n,), len(changes), device=x.device)
            for number, index in enumerate(inside):
                which[index] = number
            down, up = (F.pad(t, (0, 0, 0, 0, 0, 1))[which] for t in (down, up))  # none: zeros
        return down, up

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

    def _owner(self, anchor: nn.Module) -> nn.Module:
        inner = self.site.path[len(self.site.anchor) + 1 :] if self.site.anchor else ""
        return at(anchor, inner)


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
