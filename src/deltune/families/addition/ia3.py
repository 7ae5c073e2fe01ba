"""(IA)^3: keys, values and inner activations times learned vectors."""

from dataclasses import dataclass
from typing import ClassVar

from deltune.mechanisms.rescale import Rescaling
from deltune.sites.where import Where
from deltune.spec import Family, Paper, register


@register
@dataclass(frozen=True)
class IA3(Rescaling):
    """Keys, values and the inner activations of feed-forward parts times learned vectors.

        softmax(Q (l_k (.) K)^T / sqrt(d_k)) (l_v (.) V),    (l_ff (.) gamma(W1 x)) W2

    with l = 1 + s d, and d trained, zero at first: l_k, l_v of the width of keys and values, l_ff
    of the feed-forward part's inner width. Trainable: d_k + d_v + d_ff for each layer (in a decoder
    with cross-attention once more d_k + d_v). Merges exactly.

    Source: Liu et al., "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than
    In-Context Learning", 2022, arXiv:2205.05638, section 3.3.
    Differs: l_k and l_v multiply keys and values with their biases, as in PEFT; the paper's T5 has
    none. The change d is trained, not l itself: the same steps under any optimiser without weight
    decay. The paper's further losses (length, wrong choices) are not part of it.
    """

    kind: ClassVar[str] = "ia3"
    family: ClassVar[Family] = "addition"
    paper: ClassVar[Paper | None] = Paper(
        "Liu et al.",
        "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning",
        2022, "2205.05638",
    )  # fmt: skip
    checked: ClassVar[str] = "PEFT 0.21.2: equal outputs and gradients"

    where: Where = "attn.k, attn.v, ffn.down"
    """The linear maps; what follows a map can be rescaled as its output, what precedes it as its
    input."""
