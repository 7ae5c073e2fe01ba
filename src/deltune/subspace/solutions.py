"""Solutions of tasks by several methods, as vectors against the method's own initialisation."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltune.errors import StoreError, SubspaceError, listing
from deltune.store.identity import describe
from deltune.store.native import read_about, read_tensors
from deltune.vector import Layout

Rows = Callable[[Sequence[int]], Tensor]
BLOCK = 2**26
"""Numbers of solutions that are read at once: as many tasks as have them together, and at least
one."""


@dataclass(frozen=True)
class Solutions:
    """What several methods found on the same tasks: for method t and task i the difference
    Delta theta_t^i = theta_t^i - theta_t^init.

    Args:
        tasks: their names, in the order of the rows.
        starts: method -> theta_t^init (n_t), the same for all tasks.
        read: method -> a function that gives the rows Delta theta_t^i (chosen, n_t) of some tasks;
            what is saved is read when it is asked for.
        deltas: method -> folder of the delta as it was before training, of saved solutions.
    """

    tasks: tuple[str, ...]
    starts: Mapping[str, Tensor]
    read: Mapping[str, Rows]
    deltas: Mapping[str, Path] = field(default_factory=dict)

    @classmethod
    def of(
        cls, tasks: Sequence[str], differences: Mapping[str, Tensor],
        starts: Mapping[str, Tensor] | None = None,
    ) -> "Solutions":  # fmt: skip
        """Solutions that are in memory.

        Args:
            tasks: their names.
            differences: method -> (tasks, n_t).
            starts: method -> (n_t); zeros if not given.

        Raises:
            SubspaceError: no method, rows that do not fit the tasks, values that are not finite.
        """
        starts = starts or {
            name: rows.new_zeros(rows.shape[1:]) for name, rows in differences.items()
        }
        if not differences or not tasks:
            raise SubspaceError("there are no solutions; give at least one task and one method")
        for name, rows in differences.items():
            if rows.ndim != 2 or len(rows) != len(tasks) or starts[name].shape != rows.shape[1:]:
                raise SubspaceError(
                    f"the solutions of `{name}` have the shape {tuple(rows.shape)} and its start "
                    f"{tuple(starts[name].shape)}; expected ({len(tasks)}, n) and (n,): one row "
                    "for each task"
                )
            if not rows.isfinite().all():
                raise SubspaceError(f"a solution of `{name}` is not finite; leave its task out")
        read = {name: (lambda i, rows=rows: rows[list(i)]) for name, rows in differences.items()}
        return cls(tuple(tasks), starts, read)

    @classmethod
    def saved(
        cls, folders: Mapping[str, Mapping[str, str | Path]], starts: Mapping[str, str | Path]
    ) -> "Solutions":
        """Solutions that lie in folders of saved deltas.

        Args:
            folders: method -> task -> folder of the trained delta.
            starts: method -> folder of the delta as it was before training.

        Raises:
            SubspaceError: methods with different tasks; deltas of different specs or backbones
                under one method, or of different backbones under two; and, when its rows are read,
                a solution that is damaged or not trained from the start (see `unrelated`):
                `without` leaves its task out. StoreError: a folder that is no delta.
        """
        if not folders or not all(folders.values()):
            raise SubspaceError("there are no solutions; give at least one task and one method")
        tasks = tuple(next(iter(folders.values())))
        for name, places in folders.items():
            if set(places) != set(tasks):
                odd = sorted(set(places) ^ set(tasks))
                raise SubspaceError(
                    f"`{name}` has not the tasks of the other methods: {listing(odd, 6)}; a joint "
                    "space needs every method's solution of every task: leave these tasks out"
                )
        every = {
            name: {"its start": starts[name], **{task: folders[name][task] for task in tasks}}
            for name in folders
        }
        about = {name: _agree(name, places) for name, places in every.items()}
        _same_backbone(about)
        layouts = {
            name: Layout.of({n: tuple(shape) for n, shape in said["layout"].items()})
            for name, said in about.items()
        }
        first = {name: _vector(starts[name], layout) for name, layout in layouts.items()}

        def rows(chosen: Sequence[int], name: str) -> Tensor:
            found = torch.empty(len(chosen), len(first[name]))
            for row, index in zip(found, chosen, strict=True):
                task, place = tasks[index], folders[name][tasks[index]]
                row.copy_(_sound(task, name, place, first[name], layouts[name]))
            return found.sub_(first[name])

        read = {name: partial(rows, name=name) for name in folders}
        return cls(tasks, first, read, {name: Path(starts[name]) for name in folders})

    @property
    def methods(self) -> tuple[str, ...]:
        """Their names, in order."""
        return tuple(self.starts)

    def without(self, *tasks: str) -> "Solutions":
        """The solutions of the other tasks.

        Raises:
            SubspaceError: a task that is none of them, or no task is left.
        """
        odd = [task for task in tasks if task not in self.tasks]
        kept = [index for index, task in enumerate(self.tasks) if task not in tasks]
        if odd or not kept:
            what = f"there is no task {listing(odd)}" if odd else "no task would be left"
            raise SubspaceError(f"{what}; the solutions are of {listing(self.tasks, 6)}")
        read = {
            name: (lambda chosen, rows=rows: rows([kept[index] for index in chosen]))
            for name, rows in self.read.items()
        }
        return replace(self, tasks=tuple(self.tasks[index] for index in kept), read=read)

    @cached_property
    def grams(self) -> dict[str, Tensor]:
        """method -> Delta theta_t Delta theta_t^T (tasks, tasks) in float64: all that a linear
        decomposition needs to know, whatever n is. No more than two blocks of tasks are in memory:
        of k blocks each is read with every one before it, (k + 1) / 2 times on average.

        Raises:
            SubspaceError: a method whose differences are all zero, which span nothing.
        """
        return {name: self._gram(name) for name in self.read}

    def blocks(self, method: str) -> Iterator[tuple[slice, Tensor]]:
        """(places of some tasks, their differences), `BLOCK` numbers of a method at a time."""
        for some in self._spans(method):
            yield some, self._rows(method, some)

    def rowwise(self, work: Callable[[str, Tensor], Tensor]) -> dict[str, Tensor]:
        """method -> what a function of a method and of some of its differences (rows, n_t) makes of
        them all (tasks, ...), a block at a time."""
        return {
            name: torch.cat([work(name, rows) for _, rows in self.blocks(name)])
            for name in self.read
        }

    def each(self) -> Iterator[tuple[str, Tensor]]:
        """(method, all its differences), one method in memory at a time."""
        for name, read in self.read.items():
            yield name, read(range(len(self.tasks)))

    def _spans(self, method: str) -> list[slice]:
        count, each = len(self.tasks), max(1, BLOCK // max(1, self.starts[method].numel()))
        return [slice(at, min(at + each, count)) for at in range(0, count, each)]

    def _rows(self, method: str, some: slice) -> Tensor:
        return self.read[method](range(some.start, some.stop))

    def _gram(self, method: str) -> Tensor:
        spans = self._spans(method)
        total = torch.empty(len(self.tasks), len(self.tasks), dtype=torch.float64)
        for at, some in enumerate(spans):
            rows = self._rows(method, some)
            total[some, some] = inner_products(rows, rows)
            for others in spans[:at]:
                total[some, others] = inner_products(rows, self._rows(method, others))
                total[others, some] = total[some, others].T
        if not total.trace():
            raise SubspaceError(
                f"every solution of `{method}` is its start: nothing was learned; train it, or "
                "leave the method out"
            )
        return total


def inner_products(one: Tensor, other: Tensor, columns: int = 2**20) -> Tensor:
    """one other^T in float64, some columns at a time."""
    total = torch.zeros(len(one), len(other), dtype=torch.float64)
    for start in range(0, one.shape[1], columns):
        left = one[:, start : start + columns].double()
        right = left if one is other else other[:, start : start + columns].double()
        total += left @ right.T
    return total


def _agree(name: str, places: Mapping[str, str | Path]) -> dict[str, Any]:
    """What all deltas of a method say of themselves."""
    first: dict[str, Any] = {}
    for task, place in places.items():
        about = read_about(place)
        first = first or about
        if _backbone(about) != _backbone(first):
            raise SubspaceError(
                f"`{name}`: `{task}` was trained on {describe(about['backbone'])}, the others on "
                f"{describe(first['backbone'])}; a space belongs to one backbone"
            )
        for part in ("spec", "layout", "scale"):
            if about.get(part) != first.get(part):
                raise SubspaceError(
                    f"`{name}`: the {part} of `{task}` (`{place}`) is not that of the others; a "
                    "method is one spec on one model: train it again, or leave the task out"
                )
    return first


def _same_backbone(about: Mapping[str, dict[str, Any]]) -> None:
    names = list(about)
    for name in names[1:]:
        if _backbone(about[name]) != _backbone(about[names[0]]):
            raise SubspaceError(
                f"`{name}` was trained on {describe(about[name]['backbone'])} and `{names[0]}` on "
                f"{describe(about[names[0]]['backbone'])}; a space belongs to one backbone"
            )


def _backbone(about: Mapping[str, Any]) -> Any:
    return (about.get("backbone") or {}).get("weights")


def _vector(place: str | Path, layout: Layout) -> Tensor:
    return layout.join(read_tensors(place, {s.name: s.shape for s in layout})).float()


def _sound(task: str, name: str, place: str | Path, start: Tensor, layout: Layout) -> Tensor:
    """The vector of a saved solution, if it is one."""
    try:
        vector = _vector(place, layout)
    except StoreError as error:
        wrong = f"cannot be read: {error}"
    else:
        if not unrelated(vector, start, layout):
            return vector
        wrong = (
            "was not trained from the start of the others: their numbers that are random at first "
            "have no correlation"
        )
    raise SubspaceError(
        f"the solution of `{task}` by `{name}` ({place}) {wrong}; train it again, or leave the "
        "task out (`Solutions.without`, `deltune subspace fit --without`)"
    )


def unrelated(vector: Tensor, start: Tensor, layout: Layout, least: int = 1024) -> bool:
    """Whether a vector has nothing of the random numbers of a start, so that it must have begun at
    others.

        z = sum_i n_i r_i / sqrt(sum_i n_i),    over the tensors i that are not constant at first

    with r_i the correlation of a tensor's n_i numbers then and now. Of independent ones z has mean
    0 and deviation 1; of training that moved each number by k times its deviation at first it is
    sqrt(sum_i n_i / (1 + k^2)).

    Args:
        vector: (n), trained.
        start: (n).
        layout: of both.
        least: with fewer random numbers than that nothing is said.

    Returns:
        z < 4.
    """
    total, count = 0.0, 0
    for slot in layout:
        one, two = (
            part.double() - part.double().mean()
            for part in (flat[slot.offset : slot.offset + slot.size] for flat in (vector, start))
        )
        lengths = float(one.norm() * two.norm())
        if lengths > 0:
            total += slot.size * float(one @ two) / lengths
            count += slot.size
    return count >= least and total < 4 * math.sqrt(count)
