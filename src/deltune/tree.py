"""The tensors of one delta, in a tree that mirrors the module paths of its model."""

from torch import Tensor, nn

from deltune.errors import StoreError
from deltune.mechanisms.modules import Node
from deltune.mechanisms.unit import Mechanism, Unit
from deltune.spec import Spec
from deltune.vector import Layout, gathered

Entry = tuple[str, nn.Module, str]
"""(name of a tensor below its delta, the module that holds it, its name there)."""


class Tree(Node):
    """One delta's tensors, mirroring the module paths of the backbone, and its state."""

    def __init__(self, name: str, spec: Spec, head: bool) -> None:
        super().__init__()
        self.name, self.spec, self.with_head = name, spec, head
        self.enabled, self.merged, self.factor = False, False, 1.0
        self.parts: dict[str, list[Unit]]
        self.__dict__["parts"] = {}
        self.entries: list[Entry] = []
        self.kept: list[Entry] = []
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.driven = False
        self.skipped: frozenset[int] = frozenset()

    @property
    def units(self) -> list[Unit]:
        """All units, in model order within each part of the spec."""
        return [unit for units in self.parts.values() for unit in units]

    @property
    def acting(self) -> list[Unit]:
        """The units that act by themselves, outside the layers that are skipped, unless the delta
        is disabled."""
        return [
            unit
            for unit in self.units
            if unit.mixer is None and unit.site.layer not in self.skipped
        ]

    def named(self) -> dict[str, nn.Parameter]:
        """Every tensor by its name, in layout order."""
        return {name: owner._parameters[own] for name, owner, own in self.entries}  # type: ignore

    def stored(self) -> dict[str, Tensor]:
        """Every tensor that is saved by its name: the trained ones, then those only kept."""
        kept = {name: owner._buffers[own] for name, owner, own in self.kept}
        return {**self.named(), **kept}  # type: ignore

    def whole(self) -> dict[str, Tensor]:
        """What is saved, detached and whole, also where processes hold pieces of it.

        Raises:
            StoreError: a tensor has not the shape that it was made with.
        """
        found = {name: gathered(tensor) for name, tensor in self.stored().items()}
        for name, tensor in found.items():
            if tuple(tensor.shape) != self.shapes.get(name, tuple(tensor.shape)):
                raise StoreError(
                    f"`{name}` of delta `{self.name}` has the shape {tuple(tensor.shape)} here, "
                    f"and {self.shapes[name]} when it was attached: a library holds it in pieces "
                    "elsewhere. Gather it first: inside `FSDP.summon_full_params(model)` or "
                    "`deepspeed.zero.GatheredParameters(delta.parameters())`"
                )
        return found

    def members(self) -> list[tuple[Mechanism, list[Unit]]]:
        """The methods that the delta is made of, each with its units in model order."""
        return [(units[0].spec, units) for units in self.parts.values()]

    def places(self) -> dict[str, Unit]:
        """Every unit by the name of the place of its tensors, in the order of `units`."""
        paths = {id(module): path for path, module in self.named_modules()}
        return {paths[id(unit)]: unit for unit in self.units}

    def trained(self) -> list[tuple[Mechanism, list[Unit]]]:
        """The methods whose tensors are not kept as they were given."""
        return [member for member in self.members() if not member[1][0].fixed]

    @property
    def neglected(self) -> bool:
        """Whether the delta would be trained without what its methods ask of training."""
        return (
            self.enabled and not self.driven
            and any(spec.asks for spec, _ in self.trained())
            and any(parameter.requires_grad for parameter in self.parameters())
        )  # fmt: skip

    def layout(self) -> Layout:
        """Names, shapes and offsets."""
        return Layout.of({name: tuple(p.shape) for name, p in self.named().items()})
