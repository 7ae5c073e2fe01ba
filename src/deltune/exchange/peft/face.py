"""A method as PEFT writes it down."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from deltune.delta import Delta
from deltune.exchange.foreign import Held, Told
from deltune.mechanisms.unit import Unit
from deltune.planning import Plan
from deltune.sites.discover import Atlas
from deltune.spec import Spec

Read = Callable[[Told, Held, Atlas], tuple[list[Spec], Any]]
"""(configuration, tensors, model) -> specs, and the tensors as `fill` wants them."""
Fill = Callable[[Plan, Any], dict[str, Tensor]]
"""(plan of the specs, tensors) -> tensors by the plan's names."""
Write = Callable[[Delta, Iterable[Unit]], tuple[dict[str, Any], dict[str, Tensor]]]
"""(delta, its units) -> configuration and tensors, these without PEFT's prefix."""
PLACES = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
          "fan_in_fan_out")  # fmt: skip
"""Fields that say where tensors are, which the tensors themselves say."""


@dataclass(frozen=True)
class Face:
    """How a method is read and written.

    Args:
        spec: the method.
        read: makes specs of a checkpoint, taking what it honours.
        fill: gives a plan its tensors.
        write: makes a checkpoint of a delta's units.
        silent: fields of the configuration that say nothing about what a trained delta does.
        defaults: what other fields hold, beside nothing, when they ask for nothing.
        prefix: of the names of modules in the file.
        bare: tensors without it.
        beside: further methods that its checkpoints may have.
        whole_numbers: ends of the names of tensors that may hold these.
        modules: whether PEFT keeps modules of the backbone as a whole beside it.
    """

    spec: type[Spec]
    read: Read
    fill: Fill
    write: Write
    silent: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=dict)
    prefix: str = "base_model.model."
    bare: tuple[str, ...] = ()
    beside: tuple[type[Spec], ...] = ()
    whole_numbers: tuple[str, ...] = ()
    modules: bool = True

    def holds(self, specs: Iterable[Spec]) -> bool:
        """Whether a checkpoint has a place for all of these, one of its method among them."""
        kinds = [type(spec) for spec in specs]
        return any(issubclass(one, self.spec) for one in kinds) and all(
            issubclass(one, (self.spec, *self.beside)) for one in kinds
        )
