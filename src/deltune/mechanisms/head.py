"""Task heads: newly initialised parts of a model, which every delta on it trains and keeps."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from deltune.errors import WhereError
from deltune.mechanisms.learning import Rate
from deltune.mechanisms.select import Select
from deltune.sites.discover import Atlas
from deltune.spec import Family, register, require


@register
@dataclass(frozen=True)
class HeadOnly(Select):
    """The task head alone: the backbone stays as it is (linear probing, in the simplest case).

    Every delta on a classification model also holds a head; several active deltas show the head
    of the one that was attached last. The head is kept as values, not as differences, because a
    newly initialised head has no pre-trained value to differ from.

    A new head wants larger steps than what it reads: `prompt + head(rate=30)` trains the head with
    30 times the learning rate of the prompt.
    """

    kind: ClassVar[str] = "head"
    family: ClassVar[Family] = "baseline"
    owns: ClassVar[bool] = True

    rate: float = 1.0
    """Learning rate of the head over that of all else."""

    def __post_init__(self) -> None:
        require(self.rate > 0.0, self, "rate", "above 0")

    def rates(self) -> Mapping[str, Rate]:
        return {"*": Rate(self.rate)}

    def chosen(self, atlas: Atlas) -> list[tuple[str, str]]:
        if not atlas.heads:
            raise WhereError(
                f"{type(atlas.model).__name__} has no newly initialised task head to train; "
                "load the model for classification, or name modules in another method's `where`"
            )
        return [
            (path, name)
            for path, module in atlas.modules.items()
            if atlas.in_head(path)
            for name, parameter in module._parameters.items()
            if parameter is not None
        ]
