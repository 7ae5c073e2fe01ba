"""A gate on a method's effect: one number for each example and site, learned from what is read.

    G = mean over real tokens of sigmoid(w_g . x + b_g)

In a stack whose tokens only look back a mean over the sequence would let them see what is to come,
and would be another one with a key/value cache: there a gate has to be one of each token.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from deltune.errors import AttachError
from deltune.mechanisms.masks import MaskedUnit, causal
from deltune.mechanisms.modules import matched
from deltune.mechanisms.tensors import Init, Param, fan_in_uniform
from deltune.mechanisms.unit import Mechanism
from deltune.sites import quirks
from deltune.sites.discover import Atlas
from deltune.sites.site import Site

Gate = bool | Literal["padded", "token"]
"""False: none. True: the mean over real tokens. `padded`: the mean over all positions. `token`: no
mean, each token has its own."""


class GatedUnit(MaskedUnit):
    """A unit whose effect may be gated."""

    def note_mask(
        self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if self.spec.gated and kwargs.get("is_causal"):
            raise AttachError(_leaks(self.spec, self.site))
        super().note_mask(attention, args, kwargs)

    def gate(self, x: Tensor) -> Tensor:
        """G (batch, 1, 1), or (..., 1) where each token has its own."""
        weight, bias = matched(x, self.w_g, self.b_g)
        open_ = torch.sigmoid(x @ weight + bias)[..., None]
        if self.spec.gated == "token":
            return open_
        where = f"the gate of `{self.spec.kind}` at `{self.site.path}`"
        real = per_row(open_, self.visible(), where, "gate='token'")
        if real is None or self.spec.gated == "padded":
            return open_.mean(1, keepdim=True)
        return mean(open_, real)[:, None]


def per_row(x: Tensor, real: Tensor | None, what: str, else_: str) -> Tensor | None:
    """Which tokens are real, for `what` is a mean over the tokens of each row of x.

    Raises:
        AttachError: x has not these tokens in its second dimension.
    """
    if x.ndim != 3 or (real is not None and real.shape[1] != x.shape[1]):
        raise AttachError(
            f"{what} is a mean over the tokens of each row, and {tuple(x.shape)} comes in there; "
            f"choose other places, or `{else_}`"
        )
    return real


def mean(x: Tensor, real: Tensor) -> Tensor:
    """The mean over real tokens (batch, tokens), of x (batch, tokens, width)."""
    share = real[..., None].to(torch.promote_types(x.dtype, torch.float))
    return (x * share).sum(1) / share.sum(1).clamp(min=1)


def gate_tensors(
    spec: Mechanism, site: Site, atlas: Atlas, width: int, weight: Init, bias: Init
) -> dict[str, Param]:
    """w_g and b_g of a method at a site that reads `width` features; nothing without a gate.

    Raises:
        AttachError: no gate can be served there.
    """
    if not spec.gated:
        return {}
    if site.kind in ("dense", "embedding"):
        raise AttachError(
            f"`{spec}`: a gate belongs to one example, and the matrix at `{site.path}` can only be "
            "changed for all at once; leave the place or the gate out"
        )
    shares = spec.watches and getattr(atlas.modules[site.attention], quirks.SHARES, False)
    if shares and site.role in ("attn.q", "attn.k"):
        raise AttachError(
            f"`{spec}`: `{site.path}` also maps relative positions, which belong to no row; gate "
            "other matrices, or use `gate='token'`"
        )
    if spec.gated == "token" and spec.mechanism == "kv":
        raise AttachError(
            f"`{spec}`: the keys and values of a prefix are the same for all tokens of a row; "
            "use `gate=True`"
        )
    if spec.watches and causal(site, atlas):
        raise AttachError(_leaks(spec, site))
    return {"w_g": Param((width,), weight), "b_g": Param((1,), bias)}


def gate_start(width: int) -> tuple[Init, Init]:
    """How w_g and b_g start: as PyTorch starts a linear map."""
    return fan_in_uniform(width), fan_in_uniform(width)


def _leaks(spec: Mechanism, site: Site) -> str:
    return (
        f"`{spec}`: at `{site.path}` tokens only look back, and a gate that is a mean over the "
        "sequence would show them what is to come; gate an encoder (`[encoder]`)"
        + ("" if spec.mechanism == "kv" else ", or use `gate='token'`, one of each token")
    )
