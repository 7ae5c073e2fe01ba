"""Ladder side-tuning."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from deltune.errors import SpecError
from deltune.mechanisms.masks import attend
from deltune.mechanisms.modules import matched
from deltune.mechanisms.side import Side
from deltune.mechanisms.tensors import Param, constant, kaiming, zeros
from deltune.mechanisms.unit import Unit
from deltune.sites.discover import Atlas
from deltune.sites.site import Site
from deltune.spec import Family, Paper, register, require


@register
@dataclass(frozen=True)
class Ladder(Side):
    """A narrow transformer beside the backbone, which is read and never trained through.

        s_0 = D_0 h_0 + c_0
        z_i = g_i s_{i-1} + (1 - g_i) (D_i h_i + c_i),    g_i = sigmoid(a_i / T)
        y_i = z_i + O MHA(norm(z_i)),    s_i = y_i + W2 ReLU(W1 norm(y_i))
        last hidden state + U norm(s_L) + u

    with h_i the detached output of block i (h_0 what the first one reads), w = d / `reduction` the
    width of s, D (w, d), U (d, w), MHA of `heads` heads, W1 (4w, w), and norm the root-mean-square
    norm with a gain. U = u = 0 at first, so the model starts unchanged. Backward keeps and touches
    nothing inside a block: memory for it is that of the side network and of the h_i.

    Masks are the blocks' own. A call that continues a key/value cache lacks the earlier tokens of
    the side network and is refused (`use_cache=False`), unless `attention=False`.
    Trainable: (dw + w + 1) + (4w^2 + w) + (8w^2 + w) for each block, dw + w + w + dw + d for each
    stack. It does not merge.

    Source: Sung, Cho and Bansal, "LST: Ladder Side-Tuning for Parameter and Memory Efficient
    Transfer Learning", 2022, arXiv:2206.06522; biases of D and U, T and the start of g as in the
    released code.
    Differs: what the ladder gives is added to the backbone's last hidden state, where the released
    code puts it in its place; its blocks have no position bias and start at random, not from
    pruned weights of the backbone; of an encoder-decoder only the decoder has one, so it reads the
    encoder through the backbone's cross-attention.
    """

    kind: ClassVar[str] = "ladder"
    family: ClassVar[Family] = "addition"
    paper: ClassVar[Paper | None] = Paper(
        "Sung et al.",
        "LST: Ladder Side-Tuning for Parameter and Memory Efficient Transfer Learning",
        2022, "2206.06522",
    )  # fmt: skip

    reduction: int = 8
    """Width of the backbone over that of the ladder."""
    heads: int = 8
    """Heads of its attention, a divisor of its width."""
    attention: bool = True
    """Whether tokens attend to each other in the ladder; without, it serves caches too."""
    temperature: float = 0.1
    """T of the gates."""

    def __post_init__(self) -> None:
        require(self.reduction >= 1, self, "reduction", "1 or more")
        require(self.heads >= 1, self, "heads", "1 or more")
        require(self.temperature > 0, self, "temperature", "above 0")

    @property
    def watches(self) -> bool:
        return self.attention

    def shared(self, sites: list[Site]) -> dict[str, Param]:
        d, w = sites[0].width, self._width(sites[0])
        return {
            "D": Param((w, d), kaiming), "c": Param((w,), zeros), "n": Param((w,), constant(1.0)),
            "U": Param((d, w), zeros), "u": Param((d,), zeros),
        }  # fmt: skip

    def tensors(self, site: Site, atlas: Atlas) -> dict[str, Param]:
        d, w, one = site.width, self._width(site), constant(1.0)
        square = Param((w, w), kaiming)
        attention = {"n1": Param((w,), one), "Q": square, "K": square, "V": square, "O": square}
        return {
            "D": Param((w, d), kaiming), "c": Param((w,), zeros), "a": Param((1,), zeros),
            **(attention if self.attention else {}),
            "n2": Param((w,), one),
            "W1": Param((4 * w, w), kaiming), "W2": Param((w, 4 * w), kaiming),
        }  # fmt: skip

    def bottom(self, shared: Any, x: Tensor) -> Tensor:
        return F.linear(x, *matched(x, shared.D, shared.c))

    def rung(self, t: Unit, s: Tensor, h: Tensor, mask: Tensor | None) -> Tensor:
        down, bias, w1, w2 = matched(h, t.D, t.c, t.W1, t.W2)
        gate = torch.sigmoid(t.a / self.temperature).to(s.dtype)
        z = gate * s + (1 - gate) * F.linear(h, down, bias)
        if self.attention:
            *qkv, out = matched(h, t.Q, t.K, t.V, t.O)
            q, k, v = (F.linear(_norm(z, t.n1), weight) for weight in qkv)
            z = z + F.linear(attend(q, k, v, self.heads, mask), out)
        return z + F.linear(F.relu(F.linear(_norm(z, t.n2), w1)), w2)

    def top(self, shared: Any, s: Tensor) -> Tensor:
        return F.linear(_norm(s, shared.n), *matched(s, shared.U, shared.u))

    def _width(self, site: Site) -> int:
        w = site.width // self.reduction
        if w * self.reduction != site.width or (self.attention and w % self.heads):
            raise SpecError(
                f"`ladder(reduction={self.reduction}, heads={self.heads})`: the model is "
                f"{site.width} wide at `{site.path}`; `reduction` must divide that, and `heads` "
                "what is left"
            )
        return w


def _norm(x: Tensor, gain: Tensor) -> Tensor:
    return F.rms_norm(x, gain.shape, gain.to(x.dtype))
