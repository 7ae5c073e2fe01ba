"""Hard-concrete gates: numbers between 0 and 1 that are 0 and 1 with positive probability."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from deltune.mechanisms.unit import Unit

EDGE = 1e-4  # log u - log(1 - u) is taken of u between EDGE and 1 - EDGE
ENDINGS = (":alpha", ":group")


def draw(units: Sequence[Unit], seed: int, endings: tuple[str, ...] = ENDINGS) -> None:
    """Draws u ~ U(0, 1) for each entry of the tensors whose names end so.

    The draws stay with their units, so that every forward of a step sees the same, also one that
    gradient checkpointing runs again.
    """
    generators: dict[torch.device, torch.Generator] = {}
    for unit in units:
        draws: dict[str, Tensor] = {}
        for name, tensor in unit._parameters.items():
            if tensor is not None and name.endswith(endings):
                device = tensor.device
                if device not in generators:
                    generators[device] = torch.Generator(device).manual_seed(seed)
                draws[name] = torch.empty_like(tensor, requires_grad=False)
                draws[name].uniform_(generator=generators[device])
        unit.__dict__["draws"] = draws


def forget(units: Sequence[Unit]) -> None:
    """Drops the draws."""
    for unit in units:
        unit.__dict__.pop("draws", None)


def drawn(t: Unit, name: str) -> Tensor | None:
    """The draws for a tensor in a step of training; None outside of one."""
    return t.__dict__.get("draws", {}).get(name) if t.training else None


def opened(alpha: Tensor, u: Tensor | None, low: float, high: float) -> Tensor:
    """z = clamp(sigmoid(log u - log(1 - u) + alpha) (high - low) + low, 0, 1); u = 1/2 for None."""
    return (_s(alpha, u) * (high - low) + low).clamp(0.0, 1.0)


def chance(alpha: Tensor, low: float, high: float) -> Tensor:
    """P(z > 0) = sigmoid(alpha - log(-low / high))."""
    return torch.sigmoid(alpha - math.log(-low / high))


def _s(alpha: Tensor, u: Tensor | None) -> Tensor:
    return torch.sigmoid(alpha if u is None else alpha + u.clamp(EDGE, 1 - EDGE).logit())


class Gated(torch.autograd.Function):
    """group * z(alpha, u) * w; keeps nothing for backward that is not there anyway."""

    @staticmethod
    def forward(
        w: Tensor, alpha: Tensor, group: Tensor, u: Tensor | None, low: float, high: float
    ) -> Tensor:
        return opened(alpha, u, low, high) * w * group

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.low, ctx.high = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (w, alpha, group, u) = grads, ctx.saved_tensors
        s, width = _s(alpha, u), ctx.high - ctx.low
        z = s * width + ctx.low
        inside = (z > 0) & (z < 1)
        z = z.clamp(0.0, 1.0)
        slope = torch.where(inside, width * s * (1 - s), 0.0)
        along = grad * w
        d_group = (along * z).sum() if ctx.needs_input_grad[2] else None
        return grad * z * group, along * slope * group, d_group, None, None, None


def gated(t: Unit, name: str, low: float, high: float) -> Tensor:
    """z_g z (.) w of parameter `name`, with the gates of `<name>:alpha` and, where the unit has
    it, `<name>:group`."""
    w, factor = t.own(name), t._parameters.get(f"{name}:group")
    if factor is None:
        factor = w.new_ones(())
    else:
        factor = opened(factor, drawn(t, f"{name}:group"), low, high)
    alpha = t.own(f"{name}:alpha")
    return Gated.apply(w, alpha, factor, drawn(t, f"{name}:alpha"), low, high)


def expected(units: Sequence[Unit], low: float, high: float) -> Tensor:
    """The expected number of open gates, those of groups included."""
    gates = [
        chance(alpha, low, high).sum()
        for t in units
        for name, alpha in t._parameters.items()
        if alpha is not None and name.endswith(ENDINGS)
    ]
    return torch.stack(gates).sum()
