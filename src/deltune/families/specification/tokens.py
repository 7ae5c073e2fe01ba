"""Trained tokens: the embeddings of chosen tokens."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from deltune.errors import SpecError
from deltune.mechanisms.select import Select
from deltune.mechanisms.tensors import Param, zeros
from deltune.mechanisms.unit import Unit
from deltune.mechanisms.weight import matrices
from deltune.sites.discover import Atlas
from deltune.sites.site import Site
from deltune.sites.where import Where, select
from deltune.spec import Family, Paper, register, require


@register
@dataclass(frozen=True)
class Tokens(Select):
    """Trains the embeddings of chosen tokens: of new ones, or of some that the model knows.

        E'[i_j] = E[i_j] + s * d_j,    j = 1 ... n,    d (n, dim) trained, zero at first

    for the rows i = `ids` of the table of input embeddings E (vocabulary, dim); the other rows stay
    as they are bit for bit. What the model ties to the table, as an output layer, follows. A table
    of new tokens is resized before: their rows are of the backbone then, and must be the same ones
    when the delta is loaded. Trainable: n dim for each table. A forward makes the changed table
    whole. Merges exactly.

    Source: Gal et al., "An Image is Worth One Word: Personalizing Text-to-Image Generation using
    Textual Inversion", 2022, arXiv:2208.01618, for one new token of a text encoder; for any tokens,
    the trainable tokens of PEFT.
    Differs: the change d is trained, not the rows themselves: the same steps under any optimiser
    without weight decay. Every row starts as it is; the paper starts a new one as that of a word
    which is near. Output layers with a table of their own are left as they are.
    """

    kind: ClassVar[str] = "tokens"
    family: ClassVar[Family] = "specification"
    paper: ClassVar[Paper | None] = Paper(
        "Gal et al.",
        "An Image is Worth One Word: Personalizing Text-to-Image Generation using Textual "
        "Inversion", 2022, "2208.01618",
    )  # fmt: skip
    checked: ClassVar[str] = "PEFT 0.21.2: equal outputs"
    example: ClassVar[str] = "tokens(ids=(5, 9))"

    ids: tuple[int, ...] = ()
    """The tokens, as their numbers in the vocabulary."""
    where: Where = "embed"
    """The tables; those of the input by default."""

    def __post_init__(self) -> None:
        require(bool(self.ids) and all(one >= 0 for one in self.ids), self, "ids",
                "one number of 0 or more, or several")  # fmt: skip
        require(len(set(self.ids)) == len(self.ids), self, "ids", "different numbers")

    def chosen(self, atlas: Atlas) -> list[tuple[str, str]]:
        tables = [s for s in matrices(atlas) if isinstance(atlas.modules[s.path], nn.Embedding)]
        return [(s.path, s.param) for s in select(atlas, self.where, tables, self.within)]

    def tensors(self, site: Site, atlas: Atlas) -> dict[str, Param]:
        (table,) = super().tensors(site, atlas).values()
        rows, dim = table.shape
        above = [one for one in self.ids if one >= rows]
        if above:
            raise SpecError(
                f"`{self.kind}`: the table at `{site.path}` has {rows} rows, and `ids` has "
                f"{above[0]}; use numbers below {rows}, or resize the table before"
            )
        return {"d": Param((len(self.ids), dim), zeros)}

    @property
    def linear(self) -> bool:
        return True

    def difference(self, t: Unit, name: str, value: Tensor) -> Tensor:
        ids = torch.tensor(self.ids, device=value.device)
        return t.d.new_zeros(value.shape).index_copy(0, ids, t.d)
