"""MAM adapter: prefixes in the attentions, parallel adapters beside the feed-forward parts."""

from dataclasses import dataclass, replace
from typing import ClassVar

from deltune.families.addition.adapter import Adapter
from deltune.families.addition.prefix import Prefix
from deltune.spec import Composite, Paper, Spec, Sum, register


@register
@dataclass(frozen=True)
class MAM(Composite):
    """Mix-and-match adapter: a short prefix in each attention, and a parallel adapter in each
    feed-forward part.

        Attn(q, [P_k; K], [P_v; V]),    P_k, P_v (l, heads * head width)
        h <- h + s (U drop(ReLU(D x + b1)) + b2),    x the input of the feed-forward part

    The same as `prefix(tokens=l, mlp=800) + adapter(width=m, placement='parallel', ...)`. D starts
    Kaiming-uniform, U and the biases at 0; the prefix is not the identity at first.
    Trainable with `mlp=None`, or once `delta.fold()` has dropped the prefix's network:
    2 l d for each attention and 2 d m + m + d for each feed-forward part; RoBERTa-base: 599,232.
    It does not merge. For BART-large the authors take `tokens=30, width=512, scale=4`.

    Source: He et al., "Towards a Unified View of Parameter-Efficient Transfer Learning", 2021,
    arXiv:2110.04366.
    Differs: networks of prefixes are made for the attentions that there are; the released code
    always makes three.
    """

    kind: ClassVar[str] = "mam"
    paper: ClassVar[Paper | None] = Paper(
        "He et al.", "Towards a Unified View of Parameter-Efficient Transfer Learning", 2021,
        "2110.04366",
    )  # fmt: skip

    tokens: int = 16
    """Prefix length l."""
    mlp: int | None = 800
    """Hidden width of the network that makes the prefix in training; None trains its tables."""
    width: int = 16
    """Bottleneck m of the adapter."""
    scale: float = 2.0
    """s."""
    dropout: float = 0.1
    """Dropout in the adapter's bottleneck, in training; the authors use that of the model."""

    def __post_init__(self) -> None:
        self.expand()  # checks the fields

    def expand(self) -> Spec:
        members = (
            Prefix(tokens=self.tokens, mlp=self.mlp),
            Adapter.parallel(self.width, self.scale, dropout=self.dropout),
        )
        return Sum(tuple(replace(part, within=self.within) for part in members))
