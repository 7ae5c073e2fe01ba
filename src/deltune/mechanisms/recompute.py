"""Results that are computed again in the backward pass instead of being kept."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks

FORWARD = "forward"

Remake = Callable[..., tuple[Any, ...]]


def remember(ctx: Any, kept: tuple[Tensor | None, ...], remake: Remake) -> None:
    """Notes on the node of a custom function what it keeps, and what makes the rest of that.

    Args:
        ctx: the node.
        kept: tensors.
        remake: gives of these, with gradients on, the result without its graph, and whatever the
            backward pass needs.
    """
    ctx.save_for_backward(*kept)
    ctx.remake, ctx.made = remake, None
    device = next(x.device.type for x in kept if x is not None)
    ctx.autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)


def again(node: Any) -> tuple[Any, ...]:
    """What `remake` gives, in a backward pass; made once for all who ask.

    The kept tensors are asked for once, as gradient checkpointing allows no more.
    """
    if node.made is None:
        device, dtype, enabled = node.autocast
        kept = node.saved_tensors
        with torch.enable_grad(), torch.autocast(device, dtype, enabled=enabled):
            node.made = node.remake(*kept)
    return node.made


@dataclass(frozen=True, slots=True)
class Again:
    """In the place of a kept result: what makes it, and as what it was seen."""

    node: Any
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def value(self) -> Tensor:
        """The tensor."""
        return again(self.node)[0].contiguous().as_strided(self.shape, self.stride)


def forgetting(result: Tensor) -> saved_tensors_hooks:
    """In it, what autograd would keep of a result is made again when it is asked for."""
    node, start, size = result.grad_fn, result.data_ptr(), result.numel()

    def pack(tensor: Tensor) -> Tensor | Again:
        if tensor.data_ptr() == start and tensor.numel() == size:
            return Again(node, tuple(tensor.shape), tensor.stride())
        return tensor.detach()  # itself would be a cycle where it is an output

    return saved_tensors_hooks(pack, lambda kept: kept.value() if isinstance(kept, Again) else kept)


def forgettable(result: Tensor) -> bool:
    """Whether it can be made again, and autograd may keep it."""
    return torch.is_grad_enabled() and hasattr(result.grad_fn, "remake")


class Whole(torch.autograd.Function):
    """forward(x), of which x alone is kept."""

    @staticmethod
    def forward(x: Tensor, forward: Callable[[Tensor], Tensor]) -> Tensor:
        return forward(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, forward = inputs

        def remake(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            x = x.detach().requires_grad_()
            made = forward(x)
            return made.detach(), made, x

        remember(ctx, (x,), remake)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        _, made, x = again(ctx)
        ctx.made = None
        return torch.autograd.grad(made, x, grads[0])[0], None


@dataclass
class Norm:
    """A frozen norm that keeps its input alone; with parameters that are trained or changed it is
    as it was, since these are not there in the backward pass."""

    module: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """The output of the module."""
        module, plain = self.module, partial(type(self.module).forward, self.module)
        own = [(name, p) for name, p in module._parameters.items() if p is not None]
        fixed = not any(p.requires_grad or name in module.__dict__ for name, p in own)
        asked = torch.is_grad_enabled() and x.requires_grad and not torch.compiler.is_compiling()
        return Whole.apply(x, plain) if fixed and asked else plain(x)
