"""How much singular triplets matter for the loss, and the choice of those that are kept.

A triplet is a row of A (..., r, in), a column of B (..., out, r) and an entry of E (..., r). Beside
each tensor a unit keeps `<name>:mean` and `<name>:spread`, and `chosen` (..., r), 1 for what stays.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from deltune.mechanisms.tensors import Param, ones, zeros
from deltune.mechanisms.unit import Unit

FACTORS = ("A", "B", "E")


def kept(factors: dict[str, Param]) -> dict[str, Param]:
    """What is kept beside A, B and E."""
    means = {
        f"{name}:{part}": Param(param.shape, zeros, trained=False)
        for name, param in factors.items()
        for part in ("mean", "spread")
    }
    return means | {"chosen": Param(factors["E"].shape, ones, trained=False)}


def state(t: Unit, name: str) -> Tensor:
    """A kept tensor of a unit."""
    found = t._buffers[name]
    assert found is not None
    return found


def follow(units: Sequence[Unit], beta1: float, beta2: float) -> None:
    """Takes |w dL/dw| of every entry into its running mean, and how far it is from that into the
    mean deviation."""
    for t in units:
        for name in FACTORS:
            tensor = t.own(name)
            if tensor.grad is not None:
                mean, now = state(t, f"{name}:mean"), (tensor.detach() * tensor.grad).abs()
                mean.lerp_(now, 1 - beta1)
                state(t, f"{name}:spread").lerp_((now - mean).abs(), 1 - beta2)


def importance(t: Unit) -> Tensor:
    """That of each triplet (..., r): its E's, and the means over A's row and B's column."""
    A, B, E = (state(t, f"{name}:mean") * state(t, f"{name}:spread") for name in FACTORS)
    return E + A.mean(-1) + B.mean(-2)


@torch.no_grad()
def choose(units: Sequence[Unit], count: int) -> None:
    """Sets E to 0 but for the `count` most important triplets of all units; of equal ones the
    first stay."""
    scores = torch.cat([importance(t).flatten() for t in units])
    order = scores.sort(descending=True, stable=True).indices
    chosen = torch.zeros_like(scores).index_fill_(0, order[:count], 1.0)
    for t, part in zip(units, chosen.split([t.E.numel() for t in units]), strict=True):
        state(t, "chosen").copy_(part.view(t.E.shape))
        t.own("E").mul_(state(t, "chosen"))


def count(units: Sequence[Unit]) -> tuple[int, int]:
    """The triplets that stay, and all."""
    return int(sum(state(t, "chosen").sum() for t in units)), sum(t.E.numel() for t in units)
