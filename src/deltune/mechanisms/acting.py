"""The units that act on a model, and their order: hooks on one module are called as they came."""

from collections import Counter

from torch import nn

from deltune.mechanisms.unit import Unit, at


class Acting:
    """The units that act, in their order.

    Attributes:
        units: changes of weights first, then what acts on the results.
        crowd: how many of them change the parameters of each module.
    """

    def __init__(self) -> None:
        self.units: list[Unit] = []
        self.crowd: Counter[str] = Counter()

    def become(self, root: nn.Module, wanted: list[Unit]) -> None:
        """Lets just these act. What goes on acting keeps its hooks, unless it comes behind a
        newcomer at one place."""
        known, before = {id(unit) for unit in wanted}, self.units
        self.units = [unit for unit in before if id(unit) in known]
        for unit in before:
            if id(unit) not in known:
                self._remove(root, unit)
        there = {id(unit) for unit in self.units}
        try:
            self._insert(root, wanted, there)
        except BaseException:
            for unit in self.units:
                self._remove(root, unit)
            self.units = []
            self.add(root, [unit for unit in wanted if id(unit) in there])
            raise
        self.units = wanted

    def add(self, root: nn.Module, units: list[Unit]) -> None:
        """Lets these act after all others."""
        for unit in units:
            self.units.append(unit)  # before, so that one that fails is removed again
            self._install(root, unit)

    def _insert(self, root: nn.Module, wanted: list[Unit], there: set[int]) -> None:
        """Installs those that are not there yet; of those behind them just what shares a place
        with one has to be installed again, to come after it."""
        places: set[int] = set()
        for unit in wanted:
            if id(unit) not in there:
                self.add(root, [unit])
            elif places and not places.isdisjoint(unit.hooked):
                self._remove(root, unit)
                self._install(root, unit)
            else:
                continue
            places.update(unit.hooked)

    def _install(self, root: nn.Module, unit: Unit) -> None:
        self.crowd.update(unit.changed)
        unit.__dict__.update(crowd=self.crowd, home=at(root, unit.site.path))
        unit.install(root)

    def _remove(self, root: nn.Module, unit: Unit) -> None:
        self.crowd.subtract(unit.changed)
        unit.remove(root)
