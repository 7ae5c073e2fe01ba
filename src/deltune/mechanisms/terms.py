"""Terms: what deltas add, in coordinates in which their effects on one place add up.

A term is the change of a matrix, in factors where it has them, the difference of a parameter, or
the factors of features. `Unit.terms` reads them, `Mechanism.hold` makes a delta of them.
"""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

if TYPE_CHECKING:
    from deltune.mechanisms.factors import LowRank
    from deltune.mechanisms.unit import Mechanism

Value = Callable[[str, str], Tensor]
"""Gives the pre-trained parameter of a module path and a name."""

Terms = Mapping[str, "Mapping[str, LowRank | Tensor]"]
"""Place below a part of a delta -> own name -> term."""


class Held(NamedTuple):
    """A spec that holds given terms, with its tensors by their names below the delta's part."""

    spec: "Mechanism"
    trained: dict[str, Tensor]
    kept: Mapping[str, Tensor] = {}
