"""Residual prompt tuning: a prompt with a small network added to it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from deltune.families.addition.prompt import Prompt
from deltune.mechanisms.tensors import Param, fan_in_uniform, kaiming, ones, zeros
from deltune.mechanisms.unit import Mechanism, Unit
from deltune.sites.discover import Atlas
from deltune.sites.site import Site
from deltune.spec import Paper, register, require


@register
@dataclass(frozen=True)
class ResidualPrompt(Prompt):
    """Learned embeddings before the input, reparameterised by a network around a skip connection.

        [P + LN(W2 relu(W1 P + b1) + b2); embed(x)],    P (l, d), W1 (b, d), W2 (d, b)

    b is `width`, LN(x) = gain * normalised(x) + bias, and one network serves all rows of P, or
    each row its own with `separate=True`. `delta.fold()` turns it into a plain `prompt`. LN makes
    the added term as large as it is trained to be, from unit variance on: the start is no plain
    prompt.

    Trainable: l d, and 2 d b + b + 3 d for each network. At the input only: nothing to merge.

    Source: Razdaibiedina et al., "Residual Prompt Tuning: Improving Prompt Tuning with Residual
    Reparameterization", 2023, arXiv:2305.03937.
    Differs: P starts from different rows of the vocabulary; the released code may draw one twice.
    The prompt stands directly before the first real token, as in `prompt`.
    """

    kind: ClassVar[str] = "residual_prompt"
    paper: ClassVar[Paper | None] = Paper(
        "Razdaibiedina et al.",
        "Residual Prompt Tuning: Improving Prompt Tuning with Residual Reparameterization", 2023,
        "2305.03937",
    )  # fmt: skip
    checked: ClassVar[str] = "its formula, in modules of torch.nn"

    tokens: int = 10
    """Prompt length l."""
    init: Literal["uniform", "positive", "vocabulary", "ids"] = "vocabulary"
    """As of `prompt`: a uniform start, sampled rows of the first `vocabulary` tokens, or `ids`."""
    vocabulary: int | None = None
    """How many tokens `vocabulary` samples from, without replacement; None: all."""
    width: int = 800
    """Hidden width b of the network."""
    separate: bool = False
    """Whether each row has a network of its own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.width >= 1, self, "width", "1 or more")

    def tensors(self, site: Site, atlas: Atlas) -> dict[str, Param]:
        d, b, each = site.shape[-1], self.width, (self.tokens,) if self.separate else ()
        return super().tensors(site, atlas) | {
            "W1": Param((*each, b, d), kaiming),
            "b1": Param((*each, b), fan_in_uniform(d)),
            "W2": Param((*each, d, b), kaiming),
            "b2": Param((*each, d), fan_in_uniform(b)),
            "gain": Param((*each, d), ones),
            "bias": Param((*each, d), zeros),
        }

    def embeddings(self, t: Unit) -> Tensor:
        hidden = F.relu((t.W1 @ t.P[..., None])[..., 0] + t.b1)
        out = (t.W2 @ hidden[..., None])[..., 0] + t.b2
        return t.P + t.gain * F.layer_norm(out, out.shape[-1:]) + t.bias

    def fold(self, units: Mapping[str, Unit]) -> tuple[Mechanism, dict[str, Tensor]] | None:
        plain = Prompt(
            self.tokens, self.init, self.bound, self.vocabulary, self.ids, within=self.within
        )
        with torch.no_grad():
            return plain, {f"{place}.P": self.embeddings(unit) for place, unit in units.items()}
