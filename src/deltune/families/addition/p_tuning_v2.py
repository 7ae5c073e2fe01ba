"""P-tuning v2: prefix tuning for language understanding."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from deltune.families.addition.prefix import Prefix
from deltune.spec import Paper, register


@register
@dataclass(frozen=True)
class PTuningV2(Prefix):
    """Learned keys and values in every attention layer, in the form made for understanding tasks.

        Attn(q, [P_k; K], [P_v; V]),    P_k, P_v (l, heads * head width) in each layer

    As `prefix`, with a start near zero, dropout on the prefix, and positions as in the released
    code, which delivers the prefix through a cache: the tokens' positions start at l, so l and the
    input together must fit the positions of the model. `positions='keep'` starts them at 0, needs
    no room, and serves models without positions to shift. `mlp = m` makes the tables from
    W2 tanh(W1 E + b1) + b2 in training; `delta.fold()` turns them into plain ones.

    Trainable when plain: 2 l d for each attention layer, and the task head. It does not merge.

    Source: Liu et al., "P-Tuning v2: Prompt Tuning Can Be Comparable to Fine-tuning Universally
    Across Scales and Tasks", 2021, arXiv:2110.07602.
    Differs: the tables start from N(0, `std`^2); in the released code their scale is left to the
    version of transformers. With `mlp`, encoder, decoder and cross-attention have a network each.
    """

    kind: ClassVar[str] = "p_tuning_v2"
    paper: ClassVar[Paper | None] = Paper(
        "Liu et al.", "P-Tuning v2: Prompt Tuning Can Be Comparable to Fine-tuning Universally "
        "Across Scales and Tasks", 2021, "2110.07602",
    )  # fmt: skip

    dropout: float = 0.1
    """Dropout on the prefix, in training."""
    std: float = 0.02
    """Standard deviation of the tables (plain) or of E at first."""
    positions: Literal["keep", "shift"] = "shift"
    """Whether the tokens' positions start at 0 or behind the prefix."""
