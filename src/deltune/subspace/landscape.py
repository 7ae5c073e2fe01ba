"""The landscape of a subspace: what every method scores over a plane of codes, and on paths."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deltune.errors import SubspaceError
from deltune.subspace.space import Subspace
from deltune.subspace.tuning import scores_at
from deltune.tasks.task import Task
from deltune.training.evaluation import Objective
from deltune.training.settings import TrainSettings

OnPoint = Callable[[int, int], None]
"""Is called with the number of evaluations that are done, and of all."""


@dataclass(frozen=True)
class Plane:
    """Codes I(x, y) = origin + x e_1 + y e_2 with orthonormal axes e.

    Args:
        origin: (d).
        axes: e_1 and e_2 (2, d).
    """

    origin: Tensor
    axes: Tensor

    @classmethod
    def through(cls, one: Tensor, two: Tensor, three: Tensor) -> "Plane":
        """The plane of three codes: the first is its origin, the second lies on its first axis.

        Raises:
            SubspaceError: the three lie on one line.
        """
        sides = torch.stack([two - one, three - one]).double()
        first = sides[0] / sides[0].norm()
        rest = sides[1] - (sides[1] @ first) * first
        if not rest.norm() > 1e-6 * sides[1].norm():
            raise SubspaceError(
                "the three codes lie on one line, or two are the same: they span no plane; give "
                "other codes, or look at the path between two of them"
            )
        return cls(one, torch.stack([first, rest / rest.norm()]).to(one.dtype))

    def code(self, x: float, y: float) -> Tensor:
        """I(x, y) (d)."""
        return self.origin + x * self.axes[0] + y * self.axes[1]

    def place(self, code: Tensor) -> tuple[float, float]:
        """(x, y) of the point of the plane that is nearest to a code."""
        x, y = (self.axes @ (code - self.origin)).tolist()
        return x, y


@dataclass(frozen=True)
class Landscape:
    """What each method scores on a grid of a plane.

    Args:
        plane: of the codes.
        xs: coordinates of the columns (w).
        ys: coordinates of the rows (h).
        values: method -> metric (h, w).
        references: method -> metric of its own delta of the task, which is 100 %.
    """

    plane: Plane
    xs: Tensor
    ys: Tensor
    values: Mapping[str, Tensor]
    references: Mapping[str, float]

    def relative(self, method: str) -> Tensor:
        """The metric over its reference (h, w)."""
        return self.values[method] / self.references[method]

    def region(self, share: float = 0.9) -> Tensor:
        """Where all methods reach a share of their references: booleans (h, w)."""
        reached = [self.relative(method) >= share for method in self.values]
        return torch.stack(reached).all(dim=0)

    def area(self, share: float = 0.9) -> float:
        """The region's share of the grid's points."""
        return float(self.region(share).double().mean())

    def rows(self) -> list[dict[str, Any]]:
        """One row for each method and point: `method`, `x`, `y`, `value`."""
        return [
            {"method": name, "x": x, "y": y, "value": value}
            for name, values in self.values.items()
            for line, y in zip(values.tolist(), self.ys.tolist(), strict=True)
            for value, x in zip(line, self.xs.tolist(), strict=True)
        ]


def survey(
    space: Subspace,
    model: nn.Module,
    tokenizer: Any,
    task: Task,
    plane: Plane,
    references: Mapping[str, float],
    settings: TrainSettings,
    *,
    within: tuple[float, float, float, float],
    points: int = 21,
    split: str = "test",
    objective: Objective | None = None,
    on_point: OnPoint | None = None,
    begun: dict[str, list[float]] | None = None,
) -> Landscape:
    """Scores every method on a grid of a plane; nothing is trained.

    Args:
        space: of the model's backbone.
        model: left as it was.
        tokenizer: of the model.
        task: scored.
        plane: of the codes.
        references: method -> metric of its own delta; these methods are scored.
        settings: batch size, precision and length of the evaluations.
        within: least and largest x, least and largest y.
        points: of the grid in each direction.
        split: of the task.
        objective: made from task, model and tokenizer if not given.
        on_point: is told the progress.
        begun: as of `scores_at`: what an earlier survey of the same grid had found.

    Raises:
        SubspaceError: a grid of fewer than 2 points a side or without extent, a reference that
            nothing can be relative to.
    """
    left, right, low, high = within
    if points < 2 or not (left < right and low < high):
        raise SubspaceError(
            f"a grid of {points} points a side in x from {left:g} to {right:g} and y from {low:g} "
            f"to {high:g} has no area; give 2 points or more, and the smaller bound first"
        )
    if bad := {name: value for name, value in references.items() if not value > 0}:
        raise SubspaceError(f"the references {bad} are not above 0; nothing is relative to them")
    xs, ys = torch.linspace(left, right, points), torch.linspace(low, high, points)
    codes = [plane.code(float(x), float(y)) for y in ys for x in xs]
    found = scores_at(
        space, model, tokenizer, task, codes, tuple(references), settings, split=split,
        objective=objective, on_point=on_point, begun=begun,
    )  # fmt: skip
    values = {name: torch.tensor(row).view(points, points) for name, row in found.items()}
    return Landscape(plane, xs, ys, values, references)


def between(one: Tensor, two: Tensor, points: int = 11) -> list[Tensor]:
    """Codes at even steps on the line from one to another, both included: the path whose scores
    tell whether two solutions are connected."""
    return [torch.lerp(one, two, share) for share in torch.linspace(0, 1, points).tolist()]


def box(
    places: Sequence[tuple[float, float]], margin: float = 0.5
) -> tuple[float, float, float, float]:
    """(least x, largest x, least y, largest y) around places, with a margin in widths of theirs."""
    (left, right), (low, high) = ((min(axis), max(axis)) for axis in zip(*places, strict=True))
    wide = margin * max(right - left, high - low)
    return left - wide, right + wide, low - wide, high + wide
