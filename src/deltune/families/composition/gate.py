"""Gate: learned shares of several deltas."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltune.errors import AttachError
from deltune.mechanisms.gate import mean, per_row
from deltune.mechanisms.masks import causal
from deltune.mechanisms.mix import Mix, MixUnit, present
from deltune.mechanisms.modules import matched
from deltune.mechanisms.tensors import Param, zeros
from deltune.sites.discover import Atlas
from deltune.sites.site import Site
from deltune.spec import register, require


@register
@dataclass(frozen=True)
class Gate(Mix):
    """Several deltas, with learned shares of each token or each example at every place.

        h <- h + sum_i g_i f_i(h),    g = softmax(W h + b),  or sigmoid

    h is what is there without the parts, W (n, d) and b (n) are trained for n parts and zero at
    first, where the softmax is the mean of the parts and each sigmoid 1/2. With `by="example"` h in
    the gate is its mean over the real tokens of a row, in encoders only. At a place where a part
    does not act its share goes to nothing. It does not merge.
    Trainable: n (d + 1) for each place, and the parts unless `frozen`.

    Source: a mixture of experts with dense gates (Jacobs et al., "Adaptive Mixtures of Local
    Experts", 1991) over deltas; one sigmoid for each part as in Mao et al. 2022, arXiv:2110.07577.

    Example:
        >>> import deltune as dt
        >>> str(dt.parse("gate(lora(rank=2), adapter(width=8), shares='sigmoid')"))
        "gate(lora(rank=2), adapter(width=8), shares='sigmoid')"
    """

    kind: ClassVar[str] = "gate"

    shares: Literal["softmax", "sigmoid"] = "softmax"
    """Whether the shares sum to 1 or each is open by itself."""
    by: Literal["token", "example"] = "token"
    """Whether each token has shares of its own, or each row."""
    frozen: bool = False
    """Whether the parts are kept as they are given (`deltune.algebra.compose`), not trained."""

    @property
    def watches(self) -> bool:
        return self.by == "example"

    @property
    def freezes(self) -> bool:
        return self.frozen

    def tensors(self, site: Site, atlas: Atlas) -> dict[str, Param]:
        require(site.width > 0, self, "parts", f"at places of a known width, not `{site.path}`")
        if self.watches and causal(site, atlas):
            raise AttachError(
                f"`{self.kind}`: at `{site.path}` tokens only look back, and shares of a whole row "
                "would show them what is to come; use `by='token'`"
            )
        n = len(self.parts)
        return {"W": Param((n, site.width), zeros), "b": Param((n,), zeros)}

    def mix(
        self, t: MixUnit, module: nn.Module, h: Tensor, changes: Sequence[Tensor | None]
    ) -> Tensor:
        here, z = present(changes)
        weight, bias = matched(h, t.W, t.b)
        read = h
        if self.watches:
            where = f"`gate(by='example')` at `{t.site.path}`"
            real = per_row(h, t.visible(), where, "by='token'")
            whole = h.mean(1) if real is None else mean(h, real).to(h.dtype)
            read = whole[:, None]
        open_ = F.linear(read, weight, bias)
        shares = open_.sigmoid() if self.shares == "sigmoid" else open_.softmax(-1)
        shares = shares[..., here].expand(*z.shape[:-1])
        return torch.einsum("...n,...nd->...d", shares.to(z.dtype), z)
