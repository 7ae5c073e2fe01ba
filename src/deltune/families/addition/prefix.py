"""Prefix tuning: learned keys and values in every attention."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from deltune.mechanisms.attention import KeyValue
from deltune.mechanisms.gate import Gate, gate_start, gate_tensors
from deltune.mechanisms.tensors import Param, fan_in_uniform, kaiming, normal
from deltune.mechanisms.unit import Mechanism, Unit
from deltune.sites.discover import Atlas
from deltune.sites.site import Site
from deltune.sites.where import Where
from deltune.spec import Family, Paper, register, require


@register
@dataclass(frozen=True)
class Prefix(KeyValue):
    """Learned keys and values before those of each attention layer.

        Attn(q, [P_k; K], [P_v; V]),    P_k, P_v (l, heads * head width) in each layer

    With `mlp = m` they come from one network for each stack (encoder, decoder and cross-attention
    have their own), which `delta.fold()` turns into the plain tables once training is over:

        [P_k; P_v] of all layers = W2 tanh(W1 E + b1) + b2,    E (l, d), W1 (m, d)

    With `gate` P_k and P_v are times a number G of each example, G = mean over its tokens of
    sigmoid(w_g . x + b_g), x the input of the attention.
    Trainable when plain: 2 l d for each attention layer (d the width of its keys), one more width
    and 1 with a gate. A prefix of zeros is not the identity: it takes attention away from the
    tokens. It does not merge.

    Source: Li and Liang, "Prefix-Tuning: Optimizing Continuous Prompts for Generation", 2021,
    arXiv:2101.00190, eq. 3 and section 4.3; `gate`: Mao et al. 2022, arXiv:2110.07577.
    Differs: joined inside attention, so the tokens keep their positions; `positions="shift"`
    counts the prefix as the first tokens, as delivery through a cache does. Plain tables start
    from N(0, `std`^2). The authors take l = 10 for GPT-2 and 200 for BART; their start from the
    states of words and their infix are left out.
    """

    kind: ClassVar[str] = "prefix"
    family: ClassVar[Family] = "addition"
    later: ClassVar[tuple[str, ...]] = ("bias",)
    paper: ClassVar[Paper | None] = Paper(
        "Li and Liang", "Prefix-Tuning: Optimizing Continuous Prompts for Generation", 2021,
        "2101.00190",
    )  # fmt: skip
    checked: ClassVar[str] = "PEFT 0.21.2: equal outputs and gradients"

    tokens: int = 20
    """Prefix length l."""
    mlp: int | None = None
    """Hidden width m of the reparameterising network; None trains the tables themselves."""
    bias: bool = True
    """Whether the network has b1 and b2."""
    dropout: float = 0.0
    """Dropout on the prefix, in training."""
    std: float = 1.0
    """Standard deviation of the tables (plain) or of E at first."""
    positions: Literal["keep", "shift"] = "keep"
    """Whether the tokens' positions start at 0 or behind the prefix."""
    gate: Gate = False
    """False, True (mean over real tokens) or `padded` (mean over all positions, as in the released
    code); encoders only."""
    where: Where = "attn"
    """The attention layers; all by default, cross-attention included."""

    def __post_init__(self) -> None:
        require(self.tokens >= 1, self, "tokens", "1 or more")
        require(self.mlp is None or self.mlp >= 1, self, "mlp", "1 or more")
        require(self.bias or self.mlp is not None, self, "bias", "True where there is no `mlp`")
        require(0.0 <= self.dropout < 1.0, self, "dropout", "in [0, 1)")
        require(self.std >= 0.0, self, "std", "0 or more")

    @property
    def length(self) -> int:
        return self.tokens

    @property
    def shifts(self) -> bool:
        return self.positions == "shift"

    def group(self, site: Site) -> str:
        return (site.stack or "all") if self.mlp else ""

    def shared(self, sites: list[Site]) -> dict[str, Param]:
        d = sites[0].width
        first = {"b1": Param((self.mlp or 0,), fan_in_uniform(d))} if self.bias else {}
        return {
            "E": Param((self.tokens, d), normal(self.std)),
            "W1": Param((self.mlp or 0, d), kaiming),
            **first,
        }

    def tensors(self, site: Site, atlas: Atlas) -> dict[str, Param]:
        gate = gate_tensors(self, site, atlas, site.width, *gate_start(site.width))
        if self.mlp is None:
            plain = normal(self.std)
            return {
                "K": Param((self.tokens, site.kv[0]), plain),
                "V": Param((self.tokens, site.kv[1]), plain),
                **gate,
            }
        last = {"b2": Param((sum(site.kv),), fan_in_uniform(self.mlp))} if self.bias else {}
        return {"W2": Param((sum(site.kv), self.mlp), kaiming), **last, **gate}

    def keys_values(self, t: Unit) -> tuple[Tensor, Tensor]:
        keys, values = self._tables(t)
        if self.dropout and t.training:
            keys, values = F.dropout(keys, self.dropout), F.dropout(values, self.dropout)
        return keys, values

    def fold(self, units: Mapping[str, Unit]) -> tuple[Mechanism, dict[str, Tensor]] | None:
        if self.mlp is None:
            return None
        with torch.no_grad():
            tables = {
                f"{place}.{name}": table
                for place, unit in units.items()
                for name, table in self._plain(unit).items()
            }
        return replace(self, mlp=None), tables

    def _plain(self, t: Unit) -> dict[str, Tensor]:
        own = dict(t.named_parameters(recurse=False))
        keys, values = self._tables(t)
        return {"K": keys, "V": values} | {n: p for n, p in own.items() if n not in ("W2", "b2")}

    def _tables(self, t: Unit) -> tuple[Tensor, Tensor]:
        if self.mlp is None:
            return t.K, t.V
        b1, b2 = (t.shared.b1, t.b2) if self.bias else (None, None)
        hidden = torch.tanh(F.linear(t.shared.E, t.shared.W1, b1))
        return F.linear(hidden, t.W2, b2).split(t.site.kv, -1)
