"""UniPELT: adapter, prefix and LoRA, each behind a gate."""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from deltune.families.addition.adapter import Adapter
from deltune.families.addition.prefix import Prefix
from deltune.families.reparameterization.lora import LoRA
from deltune.spec import Composite, Paper, Spec, Sum, register


@register
@dataclass(frozen=True)
class UniPELT(Composite):
    """A Pfeiffer adapter, a prefix and LoRA on q and v, each times a gate of its own.

        G = mean over real tokens of sigmoid(w_g . x + b_g),    x what the part reads

    adapter   h <- h + G_A (U ReLU(D u + b1) + b2) behind each feed-forward part
    prefix    Attn(q, [G_P P_k; K], [G_P P_v; V]) in each attention
    LoRA      W x + G_L B A x for q and v, each with its gate; the gate stands for alpha / r

    The same as `adapter(...) + prefix(...) + lora(...)` with `gate=True` in each. A gate of 0 takes
    the adapter or LoRA away; a prefix of zeros still draws attention.
    Trainable, for L layers of width d: 4 L (d + 1) of the gates and what the parts have;
    `delta.fold()` drops the prefix's network. It does not merge, since gates follow the input.
    Encoders only: where tokens look back alone, the mean would show them what is to come.

    Source: Mao et al., "UniPELT: A Unified Framework for Parameter-Efficient Language Model
    Tuning", 2021, arXiv:2110.07577.
    Differs: the mean leaves padding out; the released code counts it in, as `gate="padded"` does,
    so that a row depends on the batch that it is in. Its optional gate that prefix and LoRA share
    is left out.
    """

    kind: ClassVar[str] = "unipelt"
    paper: ClassVar[Paper | None] = Paper(
        "Mao et al.", "UniPELT: A Unified Framework for Parameter-Efficient Language Model Tuning",
        2021, "2110.07577",
    )  # fmt: skip

    reduction: float = 16.0
    """Width d over the adapter's bottleneck."""
    tokens: int = 10
    """Prefix length."""
    mlp: int | None = 512
    """Hidden width of the network that makes the prefix in training; None trains its tables."""
    rank: int = 8
    """Rank of LoRA."""
    gate: Literal["mean", "padded"] = "mean"
    """The mean over real tokens, or over all positions."""

    def __post_init__(self) -> None:
        self.expand()  # checks the fields

    def expand(self) -> Spec:
        gate = True if self.gate == "mean" else self.gate
        members = (
            replace(Adapter.pfeiffer(self.reduction), gate=gate),
            Prefix(tokens=self.tokens, mlp=self.mlp, gate=gate),
            LoRA(rank=self.rank, gate=gate),
        )
        return Sum(tuple(replace(part, within=self.within) for part in members))
