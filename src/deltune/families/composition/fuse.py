"""AdapterFusion: attention over what several inserted functions give."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deltune.errors import AttachError
from deltune.mechanisms.mix import Mix, MixUnit, present
from deltune.mechanisms.modules import matched
from deltune.mechanisms.step import Step
from deltune.mechanisms.tensors import Param, normal, zeros
from deltune.mechanisms.unit import Unit
from deltune.sites.discover import Atlas
from deltune.sites.site import Site
from deltune.spec import Paper, register, require


def near_identity(tensor: Tensor, generator: torch.Generator | None) -> None:
    """1 on the diagonal, 1e-6 elsewhere."""
    tensor.fill_(1e-6).fill_diagonal_(1.0)


@register
@dataclass(frozen=True)
class Fuse(Mix):
    """Attention over what several inserted functions give, at each place and for each token.

        h <- h + sum_i s_i V z_i,    s = softmax_i(drop((Q h + b_q) . (K z_i + b_k))),  z_i = f_i(h)

    Q, K ~ N(0, 0.02^2), b_q = b_k = 0 and V the identity with 1e-6 off the diagonal at first; no
    factor 1/sqrt(d). At each place it attends to the parts that act there. In post-norm models with
    `placement='pfeiffer'` the functions read LN(h), and so does the query. Training adds
    `penalty_weight` times the sum over places of ||V - I||_F^2 to the loss.
    Trainable: 3 d^2 + 2 d for each place (2 d^2 + 2 d without `value`), and the parts unless
    `frozen`. It does not merge. Parts are functions inserted into the model (adapters, compacter);
    others are refused.

    Fusion is learned over trained functions: `deltune.algebra.compose` copies those of other
    deltas in, and `frozen=True` keeps them as they are.

    Source: Pfeiffer et al., "AdapterFusion: Non-Destructive Task Composition for Transfer
    Learning", 2021, arXiv:2005.00247, section 3.2; start, penalty and its weight 0.01 as in the
    released code.
    Differs: no temperature that falls during training. The query reads what the place holds, also
    where parallel functions read elsewhere. `value=False` is the released code's static form.

    Example:
        >>> import deltune as dt
        >>> str(dt.parse("fuse(adapter(width=8), adapter(width=4), frozen=True)"))
        'fuse(adapter(width=8), adapter(width=4), frozen=True)'
    """

    kind: ClassVar[str] = "fuse"
    paper: ClassVar[Paper | None] = Paper(
        "Pfeiffer et al.",
        "AdapterFusion: Non-Destructive Task Composition for Transfer Learning", 2021, "2005.00247",
    )  # fmt: skip

    value: bool = True
    """Whether there is V."""
    penalty_weight: float = 0.01
    """Factor on the penalty; 0 for none."""
    dropout: float = 0.0
    """Dropout on the products of query and keys, in training."""
    frozen: bool = False
    """Whether the parts are kept as they are given, not trained."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.penalty_weight >= 0.0, self, "penalty_weight", "0 or more")
        require(0.0 <= self.dropout < 1.0, self, "dropout", "in [0, 1)")

    @property
    def freezes(self) -> bool:
        return self.frozen

    @property
    def demands(self) -> bool:
        return self.value and self.penalty_weight > 0.0

    def check(self, step: Step, atlas: Atlas) -> None:
        spot = step.spec.spot(step.site, atlas.modules[step.site.path])
        mixed = step.spec.mechanism == "mix" and spot is not None and spot.side != "weight"
        if step.spec.mechanism != "insert" and not mixed:
            raise AttachError(
                f"`{self.kind}` attends to what inserted functions give, and `{step.spec.kind}` at "
                f"`{step.site.path}` is none; mix it by `gate(...)` or `average(...)`"
            )

    def tensors(self, site: Site, atlas: Atlas) -> dict[str, Param]:
        d, start = site.width, normal(0.02)
        require(d > 0, self, "parts", f"at places of a known width, not `{site.path}`")
        value = {"V": Param((d, d), near_identity)} if self.value else {}
        return {
            "Q": Param((d, d), start), "b_q": Param((d,), zeros),
            "K": Param((d, d), start), "b_k": Param((d,), zeros), **value,
        }  # fmt: skip

    def mix(
        self, t: MixUnit, module: nn.Module, h: Tensor, changes: Sequence[Tensor | None]
    ) -> Tensor:
        _, z = present(changes)
        query, b_q, key, b_k = matched(h, t.Q, t.b_q, t.K, t.b_k)
        read = t.ran(module, h) if t.site.entry else h
        q, k = F.linear(read, query, b_q), F.linear(z, key, b_k)
        scores = torch.einsum("...d,...nd->...n", q, k)
        scores = F.dropout(scores, self.dropout, t.training and self.dropout > 0)
        mixed = torch.einsum("...n,...nd->...d", scores.softmax(-1), z)
        return F.linear(mixed, *matched(h, t.V)) if self.value else mixed

    def penalty(self, units: Sequence[Unit]) -> Tensor | None:
        if not self.demands:
            return None
        far = [(u.V - torch.eye(*u.V.shape).to(u.V)).square().sum() for u in units]
        return self.penalty_weight * torch.stack(far).sum()
