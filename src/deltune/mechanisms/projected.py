"""Parameters that move along the directions of random maps of coordinates that they share."""

import itertools
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltune.errors import MergeError
from deltune.mechanisms.modules import at
from deltune.mechanisms.projections import Projection
from deltune.mechanisms.select import Select, SelectUnit
from deltune.mechanisms.unit import INTO, Unit
from deltune.sites.site import Site


class Whole:
    """One map of which several tensors take a part each: the product with a v is kept until it is
    asked for that of another, so that a forward pass of them all makes it once.

    Args:
        map_: from v to the numbers of all, one tensor after the other.
    """

    def __init__(self, map_: Projection) -> None:
        self.map = map_
        self._last: tuple[Any, ...] | None = None

    def project(self, v: Tensor) -> Tensor:
        """P v. A v that is the same tensor with the same values has the same product and, as
        nothing is kept for it, the same graph, through which gradients pass as often as asked.
        Inside of transforms and compiled models it is made each time."""
        if torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(v):
            return self.map.project(v)
        mode = v.requires_grad and torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        last = self._last
        known = last is not None and last[0] is v and last[1] == mode
        if last is None or not known or not torch.equal(last[2], v):
            last = self._last = v, mode, v.detach().clone(), self.map.project(v)
        return last[3]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": None}


class Part:
    """Some rows of a map, for one tensor.

    Args:
        whole: the map.
        rows: the tensor's.
    """

    def __init__(self, whole: Whole, rows: slice) -> None:
        self.whole, self.rows = whole, rows

    def project(self, v: Tensor) -> Tensor:
        """The rows of P v."""
        return self.whole.project(v)[..., self.rows]


class ProjectedUnit(SelectUnit):
    """Parameters of one module, each with its projection, or its part of that of all."""

    def __init__(self, spec: "Projected", site: Site, shared: nn.Module | None) -> None:
        super().__init__(spec, site, shared)
        self.maps: dict[str, Projection | Part]
        self.__dict__["maps"] = {}
        self.shared.__dict__.setdefault("sites", []).append(site)

    def install(self, root: nn.Module) -> None:
        for name in names_of(self.site):
            if name not in self.maps:
                self.maps[name] = self._made(root, name)
        super().install(root)

    def projection(self, name: str, size: int) -> Projection | Part:
        """The map of a parameter of this size, which its name and the seed say.

        Raises:
            MergeError: it is a part of one for all parameters, and these are not known.
        """
        spec = self.spec
        assert isinstance(spec, Projected)
        if name not in self.maps:
            if spec.joint:
                raise MergeError(
                    f"`{spec}` moves all parameters by one map, which is not known for some; {INTO}"
                )
            path = f"{self.site.path}.{name}"
            self.maps[name] = spec.drawn(size, len(self.shared.v), path)
        return self.maps[name]

    def _made(self, root: nn.Module, name: str) -> Projection | Part:
        spec, path, known = self.spec, self.site.path, self.shared.__dict__
        assert isinstance(spec, Projected)
        if not spec.joint:
            return self.projection(name, _size(root, path, name))
        if "parts" not in known:
            places = [(site.path, own) for site in known["sites"] for own in names_of(site)]
            sizes = [_size(root, *place) for place in places]
            ends = list(itertools.accumulate(sizes))
            whole = Whole(spec.drawn(ends[-1], len(self.shared.v), "all"))
            rows = [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]
            known["parts"] = {p: Part(whole, own) for p, own in zip(places, rows, strict=True)}
        return known["parts"][path, name]


@dataclass(frozen=True)
class Projected(Select):
    """A method whose changes are projections of `v`, a tensor that all its units share."""

    unit: ClassVar[type[Unit]] = ProjectedUnit

    @property
    def joint(self) -> bool:
        """Whether one map makes the changes of all parameters, in the order of the model."""
        return False

    def drawn(self, size: int, dimension: int, name: str) -> Projection:
        """The map to the parameter of a name, or to all."""
        raise NotImplementedError


def names_of(site: Site) -> list[str]:
    """The parameters of a site, those of several places once."""
    return list(dict.fromkeys(place[0] for place in site.places))


def _size(root: nn.Module, path: str, name: str) -> int:
    value = at(root, path)._parameters[name]
    assert value is not None
    return value.numel()
