"""P-tuning: prompt rows from a small network of all of them, in the slots of a template."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from deltune.mechanisms.prompt import Prompting
from deltune.mechanisms.slots import Slot
from deltune.mechanisms.tensors import Param, fan_in_uniform, kaiming, normal
from deltune.mechanisms.unit import Mechanism, Unit
from deltune.sites.discover import Atlas
from deltune.sites.site import Site
from deltune.spec import Family, Paper, register, require

RUNS = ("l0", "l0_reverse"), ("l1", "l1_reverse")


@register
@dataclass(frozen=True)
class PTuning(Prompting):
    """Prompt rows in slots between the embedded tokens, made by a network of all rows.

        P = W2 relu(W1 H + b1) + b2,    H = BiLSTM(E),    E (k, d), W1 (d, 2h), W2 (d, d)

    `slots` are the numbers of rows, k in all, and `at` their places, each beside a real token of
    the input. The template (3, 3, 3) of the paper is `slots=(3, 3, 3), at=(1, 'after 103', -1)`
    for inputs `[CLS] [MASK] head [SEP]` where 103 is the id of `[MASK]`. The LSTM has two layers
    of width h in each direction: d/2 with `state='half'`, d with `'full'`; `encoder='mlp'` has
    H = E. `delta.fold()` turns P into plain rows, `encoder='none'`. The language model is frozen;
    `p_tuning(...) + full` trains it too.

    Trainable: k d, and 14 d^2 + 18 d for LSTM and MLP with h = d/2 (43 d^2 + 34 d with h = d),
    2 d^2 + 2 d for the MLP alone. At the input only, so there is nothing to merge.

    Source: Liu et al., "GPT Understands, Too", 2021, arXiv:2103.10385; the network as in the
    released code, which has h = d/2 for LAMA and h = d for SuperGLUE.
    Differs: the rows are joined to the input instead of written over placeholders in it, and
    their states are taken out again, so that labels and logits keep the length of the input.
    """

    kind: ClassVar[str] = "p_tuning"
    family: ClassVar[Family] = "addition"
    paper: ClassVar[Paper | None] = Paper("Liu et al.", "GPT Understands, Too", 2021, "2103.10385")
    checked: ClassVar[str] = "PEFT 0.21.2 and torch.nn.LSTM: equal outputs and gradients"

    slots: tuple[int, ...] = (20,)
    """Prompt rows in each slot."""
    at: tuple[int | str, ...] = (0,)
    """The place of each slot: before the real token of this number (`-1` is the last one), at the
    `end`, or `before 103` and `after 103`, beside the first token with this id."""
    encoder: Literal["lstm", "mlp", "none"] = "lstm"
    """What makes the rows: LSTM and MLP, the MLP alone, or nothing: the rows are trained."""
    state: Literal["half", "full"] = "half"
    """Width h of the LSTM in each direction: d/2 or d."""
    dropout: float = 0.0
    """Dropout between the layers of the LSTM, in training."""

    def __post_init__(self) -> None:
        require(bool(self.slots) and min(self.slots) >= 1, self, "slots", "1 or more rows each")
        places = f"one place for each of the {len(self.slots)} slots"
        require(len(self.at) == len(self.slots), self, "at", places)
        require(0.0 <= self.dropout < 1.0, self, "dropout", "in [0, 1)")
        recurrent = self.encoder == "lstm"
        require(recurrent or self.state == "half", self, "state", "left out without an LSTM")
        require(recurrent or self.dropout == 0.0, self, "dropout", "left out without an LSTM")
        _ = self.slotted

    @property
    def length(self) -> int:
        return sum(self.slots)

    @property
    def slotted(self) -> tuple[Slot, ...]:
        return tuple(map(Slot.at, self.slots, self.at))

    def tensors(self, site: Site, atlas: Atlas) -> dict[str, Param]:
        d = site.shape[-1]
        if self.encoder == "none":
            return {"P": Param((self.length, d), normal(1.0))}
        found, wide = {"E": Param((self.length, d), normal(1.0))}, d
        if self.encoder == "lstm":
            h = d if self.state == "full" else d // 2
            wide, start = 2 * h, fan_in_uniform(h)
            for into, runs in zip((d, wide), RUNS, strict=True):
                for run in runs:
                    found |= {
                        f"weight_ih_{run}": Param((4 * h, into), start),
                        f"weight_hh_{run}": Param((4 * h, h), start),
                        f"bias_ih_{run}": Param((4 * h,), start),
                        f"bias_hh_{run}": Param((4 * h,), start),
                    }
        return found | {
            "W1": Param((d, wide), kaiming),
            "b1": Param((d,), fan_in_uniform(wide)),
            "W2": Param((d, d), kaiming),
            "b2": Param((d,), fan_in_uniform(d)),
        }

    def embeddings(self, t: Unit) -> Tensor:
        if self.encoder == "none":
            return t.P
        rows = t.E
        for layer, (forth, back) in enumerate(RUNS if self.encoder == "lstm" else ()):
            if layer and self.dropout and t.training:
                rows = F.dropout(rows, self.dropout)
            rows = torch.cat([_states(t, forth, rows), _states(t, back, rows.flip(0)).flip(0)], 1)
        return F.linear(F.relu(F.linear(rows, t.W1, t.b1)), t.W2, t.b2)

    def fold(self, units: Mapping[str, Unit]) -> tuple[Mechanism, dict[str, Tensor]] | None:
        if self.encoder == "none":
            return None
        with torch.no_grad():
            rows = {f"{place}.P": self.embeddings(unit) for place, unit in units.items()}
        return replace(self, encoder="none", state="half", dropout=0.0), rows


def _states(t: Unit, run: str, rows: Tensor) -> Tensor:
    """The states of one LSTM over the rows, the first read first; gates i, f, g, o."""
    bias = t.own(f"bias_ih_{run}") + t.own(f"bias_hh_{run}")
    weight, found = t.own(f"weight_hh_{run}"), []
    h = c = rows.new_zeros(weight.shape[1])
    for read in F.linear(rows, t.own(f"weight_ih_{run}"), bias):
        i, f, g, o = (read + F.linear(h, weight)).chunk(4)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        found.append(h)
    return torch.stack(found)
