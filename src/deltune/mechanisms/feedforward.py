"""Feed-forward parts that keep for backward only what they cannot compute again cheaply.

    out = D f,   f = g(e) (.) u,   e = G x,  u = U x      gated
    out = D f,   f = g(e),         e = U x                plain

Kept are e and u, of the width of the inside; g(e) and f are computed from them in the backward
pass, also for a delta on D, which reads f. Of an x that a lean norm gave, deltas on G and U keep
nothing. No matrix product runs twice. The module's own forward is hidden behind one that does the
same, and shown again at the end.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from deltune.errors import AttachError
from deltune.mechanisms.recompute import FORWARD, again, forgettable, forgetting, remember
from deltune.sites.discover import Atlas
from deltune.sites.site import Site

ROLES = ("ffn.gate", "ffn.up", "ffn.gate_up", "ffn.down")


class Product(torch.autograd.Function):
    """g(e) (.) u, or g(e) alone; keeps e and u."""

    @staticmethod
    def forward(e: Tensor, u: Tensor | None, act: Callable[[Tensor], Tensor]) -> Tensor:
        return act(e) if u is None else act(e) * u

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        e, u, act = inputs

        def remake(e: Tensor, u: Tensor | None) -> tuple[Any, ...]:
            e = e.detach().requires_grad_()
            acted = act(e)
            plain = acted.detach()
            return plain if u is None else plain * u, acted, e, u

        remember(ctx, (e, u), remake)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (grad,), (_, acted, e, u) = grads, again(ctx)
        ctx.made, de, du = None, None, None
        if u is not None and ctx.needs_input_grad[1]:
            du = grad * acted.detach()
        if ctx.needs_input_grad[0]:
            (de,) = torch.autograd.grad(acted, e, grad if u is None else grad * u)
        return de, du, None


@dataclass
class FeedForward:
    """One feed-forward module, in its lean form.

    Args:
        path: of the module, for messages.
        into: the linear maps that read the input: of e alone, of e and u, or of both at once.
        fused: whether one map gives e and u.
        act: g.
        down: the linear map behind.
        after: what acts on its output.
        inside: dropouts between, which have to be off.
    """

    path: str
    into: list[nn.Module]
    fused: bool
    act: nn.Module
    down: nn.Module
    after: list[nn.Module] = field(default_factory=list)
    inside: list[nn.Dropout] = field(default_factory=list)

    def forward(self, x: Tensor) -> Tensor:
        """The output of the module."""
        odd = next((drop for drop in self.inside if drop.training and drop.p > 0), None)
        if odd is not None:
            raise AttachError(
                f"`{self.path}` drops values (p = {odd.p}) between its activation and its last "
                "map, so that they cannot be computed again; train it without the backbone's "
                "dropout (`TrainSettings(backbone_dropout=False)`), or without lean parts"
            )
        compiling = torch.compiler.is_compiling()  # a compiler chooses itself what it keeps
        with forgetting(x) if not compiling and forgettable(x) else nullcontext():
            e, *rest = [module(x) for module in self.into]
        if self.fused:
            e, *rest = e.chunk(2, -1)
        u = rest[0] if rest else None
        f = (Product.forward if compiling else Product.apply)(e, u, self.act)
        with forgetting(f) if not compiling and forgettable(f) else nullcontext():
            out = self.down(f)
        for module in self.after:
            out = module(out)
        return out


def recognise(atlas: Atlas, part: Site) -> tuple[nn.Module, FeedForward]:
    """The module of a feed-forward sub-layer, and its lean form, which gives the same bit for bit.

    Raises:
        AttachError: it is not of a known structure, or gives something else.
    """
    here = [
        s for s in atlas.sites
        if s.role in ROLES and (s.stack, s.layer) == (part.stack, part.layer) and s.rows is None
    ]  # fmt: skip
    found = {site.role: atlas.modules[site.path] for site in here}
    parents = {site.path.rpartition(".")[0] for site in here}
    whole = len(here) == len(found) and all(site.kind in ("linear", "conv1d") for site in here)
    if not whole or len(parents) != 1 or "ffn.down" not in found or len(found) < 2:
        raise AttachError(_unknown(part.path, "its maps are not those of one module"))
    path = parents.pop()
    module = atlas.modules[path]
    children = [child for child in module._modules.values() if child is not None]
    drops: list[Any] = [child for child in children if isinstance(child, nn.Dropout)]
    acts = [c for c in children if c not in drops and not any(True for _ in c.parameters())]
    if len(acts) != 1 or len(children) != len(found) + len(drops) + 1:
        names = ", ".join(type(child).__name__ for child in children)
        raise AttachError(_unknown(path, f"it holds {names}"))
    if FORWARD in module.__dict__:
        raise AttachError(_unknown(path, "its forward was replaced already"))
    into = [found[role] for role in ROLES[:3] if role in found]
    made = FeedForward(path, into, "ffn.gate_up" in found, acts[0], found["ffn.down"])
    for behind in (False, True):
        made.after, made.inside = list(drops if behind else []), [] if behind else drops
        if _same(module, made, into[0]):
            return module, made
    raise AttachError(_unknown(path, "it does not give the last map of their product"))


@torch.no_grad()
def _same(module: nn.Module, made: FeedForward, first: nn.Module) -> bool:
    """Whether both give the same, with the same random numbers in the mode that they are in."""
    weight: Any = first.weight
    width = weight.shape[0 if type(first).__name__ == "Conv1D" else 1]
    dropped = any(drop.training and drop.p > 0 for drop in made.inside)
    if dropped:
        return False
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, width, generator=draw).to(weight.device, weight.dtype)
    found = []
    for forward in (module.forward, made.forward):
        devices = [x.device] if x.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(0)
            found.append(forward(x))
    return isinstance(found[0], Tensor) and torch.equal(found[0], found[1])


def _unknown(path: str, why: str) -> str:
    return (
        f"the feed-forward part `{path}` is not one that can be made lean: {why}; known are "
        "D (g(G x) (.) U x) and D g(U x) of linear maps in one module; pass feed_forward=False"
    )
