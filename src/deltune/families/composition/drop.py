"""Drop: a delta without some layers."""

from dataclasses import dataclass
from typing import ClassVar

from deltune.errors import WhereError
from deltune.mechanisms.step import Step
from deltune.mechanisms.tensors import Param
from deltune.sites.discover import Atlas
from deltune.sites.where import in_layers
from deltune.spec import Operator, register, require


@register
@dataclass(frozen=True)
class Drop(Operator):
    """Deltas without their units in some layers of every stack, which are not even made.

    What is left acts as under `delta.skip` of these layers, at no cost for those left out, in
    training too. What belongs to no layer, such as a prompt, stays. The opposite, a delta in some
    layers alone, is written in brackets: `lora[0:4] + adapter[4:]` has another method from layer 4
    on.

    Source: Rueckle et al., "AdapterDrop: On the Efficiency of Adapters in Transformers", 2021,
    arXiv:2010.11918, section 3 (specialised AdapterDrop).

    Example:
        >>> import deltune as dt
        >>> str(dt.parse("drop(lora + bitfit, layers='0:5')"))
        "drop(lora + bitfit, layers='0:5')"
    """

    kind: ClassVar[str] = "drop"

    layers: str = ""
    """The layers, as in `where`: `0:5`, `-2:`, `3`; several with commas."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.layers.strip()), self, "layers", "layers such as `0:5`")

    def arranged(
        self, below: list[list[Step]], name: str, atlas: Atlas, shared: dict[str, dict[str, Param]]
    ) -> list[Step]:
        steps = [step for found in below for step in found]
        ranges = [text.strip() for text in self.layers.split(",")]

        def dropped(step: Step, text: str) -> bool:
            term = f"drop(layers={self.layers!r})"
            return in_layers(text, step.site, [*atlas.sites, step.site], term)

        for text in ranges:
            if not any(dropped(step, text) for step in steps):
                here = sorted({n for step in steps if (n := step.site.layer) is not None})
                raise WhereError(
                    f"`drop` of the layers `{text}` leaves nothing out; its parts are in layers "
                    f"{here or 'none'}"
                )
        left = [step for step in steps if not any(dropped(step, text) for text in ranges)]
        if not left:
            raise WhereError(f"`drop` of the layers `{self.layers}` leaves nothing of its parts")
        return left
