"""APT: adaptive prefix tuning."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from deltune.errors import AttachError
from deltune.families.addition.p_tuning_v2 import PTuningV2
from deltune.mechanisms.gate import mean
from deltune.mechanisms.masks import causal
from deltune.mechanisms.modules import matched
from deltune.mechanisms.tensors import Param, constant, normal
from deltune.mechanisms.unit import Unit
from deltune.sites.discover import Atlas
from deltune.sites.site import Site
from deltune.spec import Paper, register, require


@register
@dataclass(frozen=True)
class APT(PTuningV2):
    """A prefix that each layer weighs anew for each input, slot by slot and as a whole.

        Attn(q, [lambda alpha P_k; K], [lambda alpha P_v; V]),    alpha = sigmoid(W h)

    with alpha in (0, 1)^l, one for each slot, lambda a number of each layer, W (l, d), and h (d) a
    summary of what the layer's attention reads: the first token, or the mean over real tokens.
    With alpha = lambda = 1 it is `p_tuning_v2`; lambda = 0 still leaves zero keys that draw
    attention. A call that continues a key/value cache lacks the summary and is refused:
    `use_cache=False`.
    Trainable when plain: 2 l d + l d + 1 for each attention layer. It does not merge.

    Source: Zhang et al., "Towards Adaptive Prefix Tuning for Parameter-Efficient Language Model
    Fine-tuning", 2023, arXiv:2305.15212.
    Differs: no code was published with the paper, and the formula here is reconstructed from the
    gates that its abstract describes. Which token sums up a layer, and that lambda starts at 1 and
    W from N(0, 0.02^2), are choices. In pre-norm models h is the normalised state.
    """

    kind: ClassVar[str] = "apt"
    paper: ClassVar[Paper | None] = Paper(
        "Zhang et al.", "Towards Adaptive Prefix Tuning for Parameter-Efficient Language Model "
        "Fine-tuning", 2023, "2305.15212",
    )  # fmt: skip

    summary: Literal["first", "mean"] = "first"
    """What h is: the first real token, or the mean over real tokens (encoders only)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(not self.gate, self, "gate", "left out: the prefix is gated already")

    @property
    def watches(self) -> bool:
        return True

    def tensors(self, site: Site, atlas: Atlas) -> dict[str, Param]:
        if self.summary == "mean" and causal(site, atlas):
            raise AttachError(
                f"`{self}`: at `{site.path}` tokens only look back, and a mean over the sequence "
                "would show them what is to come; use `summary='first'`"
            )
        return {
            **super().tensors(site, atlas),
            "W": Param((self.tokens, site.width), normal(0.02)),
            "lam": Param((1,), constant(1.0)),
        }

    def keys_values(self, t: Unit) -> tuple[Tensor, Tensor]:
        keys, values = super().keys_values(t)
        weight, scale = matched(t.x, t.W, t.lam)
        alpha = torch.sigmoid(self._summary(t) @ weight.mT)[..., None]
        return scale * (alpha * keys), scale * (alpha * values)

    def _summary(self, t: Unit) -> Tensor:
        x, real = t.x, t.visible()
        if real is None:
            return x[:, 0] if self.summary == "first" else x.mean(1)
        real = real.expand(x.shape[0], -1)
        if self.summary == "mean":
            return mean(x, real).to(x.dtype)
        return x[torch.arange(x.shape[0], device=x.device), real.int().argmax(1)]
