"""Binary masks on matrices of the backbone: packed bits, the k largest, the straight-through
gradient, and what methods that keep or drop entries have in common."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltune.errors import SpecError
from deltune.mechanisms.modules import at
from deltune.mechanisms.select import Select, SelectUnit
from deltune.mechanisms.tensors import Init, Param, zeros
from deltune.mechanisms.unit import Unit
from deltune.mechanisms.weight import matrices
from deltune.sites.discover import Atlas
from deltune.sites.site import Site
from deltune.sites.where import Where, select
from deltune.spec import Spec


def packed(count: int) -> int:
    """Bytes that hold `count` bits."""
    return -(-count // 8)


def pack(mask: Tensor) -> Tensor:
    """A boolean tensor as bytes: entry 8 i + j of the flattened mask is bit j of byte i."""
    flat = mask.new_zeros(8 * packed(mask.numel()), dtype=torch.uint8)
    flat[: mask.numel()] = mask.reshape(-1)
    return (flat.view(-1, 8) * _powers(mask)).sum(-1, dtype=torch.uint8)


def unpack(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """Undoes `pack`."""
    flat = (bits[:, None] & _powers(bits)).reshape(-1)
    return (flat[: torch.Size(shape).numel()] != 0).view(shape)


def _powers(like: Tensor) -> Tensor:
    return torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8, device=like.device)


def top(scores: Tensor, k: int | Tensor) -> Tensor:
    """The mask of exactly the `k` largest scores; of equal ones the first are kept."""
    flat = scores.detach().reshape(-1)
    if not isinstance(k, Tensor) and not 0 < k < flat.numel():
        return torch.full_like(scores, k > 0, dtype=torch.bool)
    if not isinstance(k, Tensor) and flat.device.type == "cpu":
        edge = flat.kthvalue(flat.numel() - k + 1).values
    else:  # on a GPU `kthvalue` is refused where deterministic algorithms are asked for
        at = torch.as_tensor(flat.numel() - k, device=flat.device).clamp(max=flat.numel() - 1)
        edge = flat.sort().values.index_select(0, at.reshape(1))  # `values[at]` waits for `at`
    above, level = flat > edge, flat == edge
    chosen = above | (level & (level.cumsum(0) <= k - above.sum()))
    return chosen.view(scores.shape)


class StateUnit(SelectUnit):
    """A unit with kept tensors of one element that decide how it acts.

    Reading one waits for the device, so it is read again only after it was written.
    """

    def __init__(self, spec: Select, site: Site, shared: nn.Module | None) -> None:
        super().__init__(spec, site, shared)
        self.read: dict[str, tuple[Tensor, int, float]]
        self.__dict__["read"] = {}

    def __getstate__(self) -> dict[str, Any]:
        # A copied tensor may reach the version of this one with another value.
        return {**self.__dict__, "read": {}}

    def state(self, name: str) -> Any:
        """The value of a kept tensor of one element; the tensor itself while a compiler looks, to
        which a number would be a constant."""
        kept = self._buffers[name]
        assert kept is not None
        if torch.compiler.is_compiling():
            return kept
        if kept.is_inference():  # they count no writes
            return kept.item()
        tensor, version, value = self.read.get(name, (None, -1, 0.0))
        if tensor is not kept or version != kept._version:
            value = kept.item()
            self.read[name] = (kept, kept._version, value)
        return value

    def either(self, name: str, one: Callable[[], Tensor], other: Callable[[], Tensor]) -> Tensor:
        """`one()` where a kept tensor of one element is set, `other()` where it is 0."""
        if torch.compiler.is_compiling():
            return torch.where(self.state(name) != 0, one(), other())
        return one() if self.state(name) else other()

    def become(self, name: str, value: float) -> None:
        """Sets a kept tensor of one element."""
        kept = self._buffers[name]
        assert kept is not None
        kept.fill_(value)
        if not kept.is_inference():
            self.read[name] = (kept, kept._version, value)


class Straight(torch.autograd.Function):
    """(value + change) (.) mask - value: what makes of `value` the masked, changed matrix.

    The scores get the gradient of the mask as if it were numbers, for every entry of it.
    """

    @staticmethod
    def forward(scores: Tensor, mask: Tensor, value: Tensor, change: Tensor | None) -> Tensor:
        if change is None:
            return (-value).masked_fill(mask, 0.0)
        return torch.where(mask, change, -value)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, *kept = inputs
        ctx.save_for_backward(*kept)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, Tensor | None]:
        (grad,), (mask, value, change) = grads, ctx.saved_tensors
        d_scores = grad * (value if change is None else value + change)
        d_change = grad.masked_fill(~mask, 0.0) if ctx.needs_input_grad[3] else None
        return d_scores, None, None, d_change


def straight(scores: Tensor, mask: Tensor, value: Tensor, change: Tensor | None = None) -> Tensor:
    """The change of `value` to (value + change) (.) mask, with a straight-through gradient.

    Args:
        scores: what the mask was made of, of its shape; gets dL/d(mask).
        mask: which entries stay.
        value: the pre-trained matrix.
        change: of the entries that stay; None for no change.
    """
    return Straight.apply(scores, mask, value.to(scores.dtype), change)


@dataclass(frozen=True)
class Masked(Select):
    """A method that keeps some entries of matrices and drops the others: define `tensors`,
    `difference` and `mask`. Fused matrices are taken whole."""

    unit: ClassVar[type[Unit]] = StateUnit

    where: Where = "attn, ffn"
    """The matrices."""

    def mask(self, t: Unit, name: str, shape: Sequence[int]) -> Tensor:
        """Which entries of parameter `name`, of this shape, stay."""
        raise NotImplementedError

    def left(self, t: Unit, name: str, shape: Sequence[int]) -> int:
        """How many entries stay."""
        return int(self.mask(t, name, shape).sum())

    def candidates(self, atlas: Atlas) -> list[Site]:
        """The matrices that `where` chooses from."""
        return [site for site in matrices(atlas) if site.rows is None]

    def chosen(self, atlas: Atlas) -> list[tuple[str, str]]:
        found = select(atlas, self.where, self.candidates(atlas), self.within)
        return [(site.path, site.param) for site in found]

    def note(self, units: Sequence[Unit], model: nn.Module) -> str:
        kept = total = 0
        for unit, name in targets(units):
            value = at(model, unit.site.path)._parameters[name]
            assert value is not None
            kept += self.left(unit, name, value.shape)
            total += value.numel()
        return f"{kept:,} of {total:,} weights kept"


def cubic(step: float, begin: float, end: float) -> float:
    """1 until `begin`, 0 from `end` on, (1 - (step - begin) / (end - begin))^3 between."""
    return 1.0 if step <= begin else max(0.0, 1 - (step - begin) / (end - begin)) ** 3


def targets(units: Iterable[Unit]) -> Iterator[tuple[Unit, str]]:
    """Every parameter of the backbone that these units change: its unit and its name there."""
    for unit in units:
        for name in dict.fromkeys(place[0] for place in unit.site.places):
            yield unit, name


def bits_of(shape: Sequence[int], init: Init = zeros) -> Param:
    """The packed mask of a parameter of this shape, empty at first."""
    return Param((packed(prod(shape)),), init, trained=False, dtype=torch.uint8)


def budget(spec: Spec, field: str, total: int, of: str) -> int:
    """How many of `total` entries a field of the spec leaves as its share of them, at least one.

    Args:
        spec: the method.
        field: the name of the field that holds the share.
        total: the number of entries.
        of: what they belong to, for the message.

    Raises:
        SpecError: the share is so small that no entry is left.
    """
    kept = int(getattr(spec, field) * total)
    if kept == 0:
        raise SpecError(
            f"`{spec}` leaves none of the {total:,} entries of {of}; use a `{field}` of "
            f"{1.01 / total:.3g} or more"
        )
    return kept


def remaining(t: Unit, name: str) -> Tensor:
    """The tensor of parameter `name` within the mask that `prune` has kept."""
    own = t.own(name)
    return torch.where(unpack(getattr(t, f"{name}:bits"), own.shape), own, 0.0)


@torch.no_grad()
def prune(units: Sequence[Unit], changes: Sequence[Tensor], k: int) -> None:
    """Keeps the `k` largest of all changes in magnitude: they become the units' tensors, which are
    zero elsewhere, and their mask becomes `<parameter>:bits`."""
    flat = torch.cat([c.abs().reshape(-1).to(changes[0].device) for c in changes])
    masks = top(flat, k).split([c.numel() for c in changes])
    for (t, name), change, mask in zip(targets(units), changes, masks, strict=True):
        mask = mask.view(change.shape).to(change.device)
        t.own(name).copy_(torch.where(mask, change, 0.0))
        getattr(t, f"{name}:bits").copy_(pack(mask))


def gathered(units: Sequence[Unit]) -> tuple[Tensor, Tensor]:
    """The entries that `prune` has left, and their positions in all parameters joined."""
    values, index, start = [], [], 0
    for t, name in targets(units):
        mask = unpack(getattr(t, f"{name}:bits"), (t.own(name).numel(),)).cpu()
        values.append(t.own(name).detach().reshape(-1).cpu()[mask])
        index.append(mask.nonzero().flatten() + start)
        start += mask.numel()
    return torch.cat(values), torch.cat(index)
