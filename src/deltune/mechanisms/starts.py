"""Where a low-rank change starts from the matrix that it changes, or from what that matrix reads.

Each gives a pair A (r, in) and B (out, r), whose product at the change's scale s is a part of the
matrix W (out, in).
"""

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

from deltune.errors import AttachError, SpecError, TrainError
from deltune.mechanisms.modules import pretrained
from deltune.mechanisms.tensors import Init, Param, zeros
from deltune.mechanisms.unit import Unit
from deltune.sites.discover import Atlas
from deltune.sites.site import Site

Start = Literal["zero", "pissa", "olora", "eva", "corda", "corda_kpm"]
LOOKING = ("eva", "corda", "corda_kpm")
"""Those that look at what a matrix reads in training."""
Pair = tuple[Tensor, Tensor]
KEPT = ("A0", "B0", "looked")
"""What is kept beside the pair: as it started, and whether it has looked at inputs."""
DAMP = 0.01
"""Share of the mean of a diagonal that is added to it before it is inverted."""
ERROR = 0.05
"""How far a matrix times its inverse may be from the identity, in the Frobenius norm."""


class Moments:
    """Mean and second moment of the rows that a matrix reads, in float32 or more."""

    def __init__(self) -> None:
        self.count, self.sum, self.square = 0, torch.zeros(()), torch.zeros(())
        self.module: nn.Module | None = None

    @torch.no_grad()
    def add(self, module: nn.Module, x: Tensor) -> None:
        """Takes in x (..., in), which the matrix of this module reads."""
        self.module, rows = module, x.detach().flatten(0, -2)
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        self.sum = self.sum.to(rows) + rows.sum(0)
        self.square = self.square.to(rows) + rows.mT @ rows
        self.count += len(rows)

    @property
    def second(self) -> Tensor:
        """E[x x^T] (in, in)."""
        return self.square / self.count

    @property
    def covariance(self) -> Tensor:
        """E[x x^T] - E[x] E[x]^T (in, in)."""
        mean = self.sum / self.count
        return self.second - torch.outer(mean, mean)


class Once:
    """A pair that is computed when its first half is asked for."""

    def __init__(self, make: Callable[[], Pair]) -> None:
        self.make = make

    @cached_property
    def pair(self) -> Pair:
        """A and B."""
        return self.make()

    def half(self, which: int) -> Init:
        """Starts a tensor as A (0) or B (1)."""
        return lambda tensor, generator: tensor.copy_(self.pair[which])


def balanced(left: Tensor, values: Tensor, right: Tensor, scale: float) -> Pair:
    """A and B with s B A = left diag(values) right, the roots of the values in both.

    Args:
        left: (..., out, r).
        values: (..., r), 0 or more.
        right: (..., r, in).
        scale: s.
    """
    root = (values.clamp(min=0) / abs(scale)).sqrt()
    sign = 1 if scale > 0 else -1
    return root[..., :, None] * right, sign * left * root[..., None, :]


def principal(weight: Tensor, rank: int, scale: float) -> Pair:
    """The r largest singular triplets of W."""
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    return balanced(left[..., :rank], values[..., :rank], right[..., :rank, :], scale)


def triangular(weight: Tensor, rank: int, scale: float) -> Pair:
    """B = the first r columns of Q and A = the first r rows of R, with Q R = W."""
    Q, R = torch.linalg.qr(weight)
    return R[..., :rank, :], Q[..., :rank]


def oriented(weight: Tensor, moments: Moments, rank: int, scale: float, least: bool) -> Pair:
    """B A C / s = the r largest singular triplets of W C, or its r smallest ones, with C = E[x x^T]
    made invertible."""
    second = moments.second
    eye, damp = torch.eye(len(second), dtype=second.dtype, device=second.device), DAMP
    while True:
        C = second + damp * second.diagonal().mean() * eye
        inverse, info = torch.linalg.inv_ex(C)
        if not info and torch.dist(C @ inverse, eye) < ERROR:
            break
        damp *= 2
        if not damp < 1e6:
            raise TrainError("the inputs of a matrix are all zero or not finite; check the data")
    left, values, right = torch.linalg.svd(weight @ C, full_matrices=False)
    chosen = slice(len(values) - rank, None) if least else slice(rank)
    return balanced(left[:, chosen], values[chosen], right[chosen] @ inverse, scale)


def explained(moments: Moments, rank: int) -> Tensor:
    """A (r, in): the directions in which the inputs vary most."""
    return torch.linalg.eigh(moments.covariance).eigenvectors.flip(1)[:, :rank].mT


FROM_THE_WEIGHT = {"pissa": principal, "olora": triangular}


def declared(
    start: Start, pair: dict[str, Param], site: Site, atlas: Atlas, scale: float
) -> dict[str, Param]:
    """The tensors of a low-rank change that starts so, from those of one that starts at zero.

    Raises:
        SpecError: the scale is 0.
        AttachError: it looks at inputs, and no module is called on the matrix alone.
    """
    if start == "zero":
        return pair
    if not scale:
        raise SpecError(f"`init={start!r}` needs a scale other than 0; raise `alpha`")
    rank = pair["A"].shape[-2]
    kept = {f"{own}0": Param(pair[own].shape, zeros, trained=False) for own in "AB"}
    if start in LOOKING:
        if site.kind not in ("linear", "conv1d"):
            raise AttachError(
                f"`init={start!r}` looks at what a linear map reads, and at `{site.path}` there is "
                "none of its own; leave the place out, or use `init='pissa'`"
            )
        flag = Param((1,), zeros, trained=False, dtype=torch.uint8)
        return pair | ({} if start == "eva" else kept) | {"looked": flag}
    module = atlas.modules[site.path]
    once = Once(lambda: FROM_THE_WEIGHT[start](_matrix(site, module), rank, scale))
    halves = {own: once.half(which) for which, own in enumerate("AB")}
    return {name: param._replace(init=halves[name[0]]) for name, param in (pair | kept).items()}


def moved(t: Unit) -> Pair:
    """A (..., r, in) and B (..., out, r) of the change: those of the unit, or of both its product
    and the one at first, taken away."""
    start = t._buffers.get("A0")
    if start is None:
        return t.A, t.B
    return torch.cat([t.A, start.to(t.A.dtype)], -2), torch.cat([t.B, -t.B0.to(t.B.dtype)], -1)


def look(
    units: Sequence[Unit], losses: Iterable[Tensor], start: Start, scale: Callable[[Unit], float]
) -> None:
    """Lets units that have not looked yet start from what their matrices read.

    Args:
        units: all of one method.
        losses: computed one by one, while this function runs.
        start: how.
        scale: s of a unit.

    Raises:
        TrainError: a matrix read nothing, or nothing but zeros.
    """
    waiting = [t for t in units if not t.looked]
    seen = [t.__dict__.setdefault("moments", Moments()) for t in waiting]
    with torch.no_grad():
        try:
            for _ in losses if waiting else ():
                pass
        finally:
            for t in waiting:
                del t.__dict__["moments"]
        for t, moments in zip(waiting, seen, strict=True):
            if moments.module is None:
                raise TrainError(
                    f"`{t.spec.kind}` cannot start: no example has reached `{t.site.path}`; leave "
                    "the place out"
                )
            _begin(t, moments, start, scale(t))


def require_looked(units: Sequence[Unit]) -> None:
    """Refuses units that have not looked."""
    late = next((t for t in units if not t.looked), None)
    if late is not None:
        raise TrainError(
            f"`{late.spec}` starts from training examples and has seen none; call "
            "`Course.prepare` before the first step"
        )


def _begin(t: Unit, moments: Moments, start: Start, scale: float) -> None:
    rank = t.A.shape[-2]
    if start == "eva":
        t.A.copy_(explained(moments, rank))
    else:
        assert moments.module is not None
        weight = _matrix(t.site, moments.module).to(moments.square.device)
        pair = oriented(weight, moments, rank, scale, least=start == "corda_kpm")
        for own, value in zip("AB", pair, strict=True):
            for name in (own, f"{own}0"):
                getattr(t, name).copy_(value)
    t.looked.fill_(1)


def _matrix(site: Site, module: nn.Module) -> Tensor:
    """The pre-trained matrix (..., out, in), in float32 or more."""
    weight = site.matrix(pretrained(module, site.param).detach())
    return weight.to(torch.promote_types(weight.dtype, torch.float32))
