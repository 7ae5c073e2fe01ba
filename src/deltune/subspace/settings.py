"""How a subspace is learned, without anything that takes long to import."""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args, get_type_hints

from deltune.errors import SubspaceError

How = Literal["principal", "correlated", "learned", "random", "fastfood"]
"""How a space is found from solutions: in closed form, learned, or drawn as a control."""
_LATER = {"interpolation": "released", "scope": "global"}
"""Options that came after the first records, and what they are where nothing was said."""


@dataclass(frozen=True, slots=True)
class FitSettings:
    """How a subspace is learned; the defaults are those of the source with many tasks."""

    dimension: int = 100
    """d."""
    steps: int = 1000
    """Updates; each sees one task."""
    learning_rate: float = 1e-4
    """Constant, of Adafactor without its relative step."""
    weight: float = 10.0
    """lambda: of the reconstruction beside the task's loss; 0.1 in the source with one task."""
    activation: Literal["tanh", "none"] = "tanh"
    """Between the two layers of the encoders; with `none` an encoder is one linear layer."""
    distance: Literal["norm", "squared", "mean"] = "norm"
    """Of a difference from what its code decodes to: the norm, as in the released code of the
    source, its square, or the mean square, as in intrinsic prompt tuning."""
    decoder: Literal["linear", "curved"] = "linear"
    """A matrix, or a hidden layer with tanh, as in intrinsic prompt tuning."""
    hidden: int = 768
    """Width of the hidden layer of a `curved` decoder."""
    interpolation: Literal["released", "uniform"] = "released"
    """How the shares of the methods' codes are drawn: each uniform in what those before it have
    left, as in the released code of the source, so that the first method has a half of it on
    average and the second a quarter; or uniform over all that add up to 1, a T-th on average."""
    scope: Literal["global", "tensor"] = "global"
    """Of the Fastfood of a method without solutions: one for its whole vector, or one for each of
    its tensors, as in the released code of the source."""
    std: float = 0.02
    """Of all weights and biases at first."""
    seed: int = 0
    """Of weights, the order of tasks and the interpolations."""

    def __post_init__(self) -> None:
        bounds = {
            "dimension": 1,
            "steps": 1,
            "learning_rate": 0,
            "weight": 0,
            "hidden": 1,
            "std": 0,
        }
        for name, least in bounds.items():
            value = getattr(self, name)
            if not least <= value < math.inf or (name == "learning_rate" and value == 0):
                raise SubspaceError(f"`{name}` is {value}; give a number from {least} on")
        for name, hint in get_type_hints(type(self)).items():
            value, choices = getattr(self, name), get_args(hint)
            if choices and value not in choices:
                raise SubspaceError(f"`{name}` is `{value}`; choose one of {', '.join(choices)}")

    def to_json(self) -> dict[str, Any]:
        """All fields as JSON values, options that came later only where they are not at their
        defaults: what was written before them keeps its digest."""
        return {n: v for n, v in asdict(self).items() if n not in _LATER or v != _LATER[n]}
