"""The learned subspace: encoders and decoders of all methods, trained together."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict

import torch
from torch import Tensor, nn

from deltune.errors import SubspaceError
from deltune.subspace.settings import FitSettings
from deltune.subspace.solutions import Solutions
from deltune.subspace.space import Encoder, Matrix, Subspace, Up

Losses = Callable[[str, Tensor], Tensor]
"""(method, vector) -> the loss of one mini-batch with that vector in the model."""


class Maps(nn.Module):
    """The maps of one method:

    Proj_down(D) = W2 tanh(W1 D + b1) + b2,    W1 (d, n), W2 (d, d)
    Proj_up(I)   = U I,                        U (n, d)
    """

    def __init__(self, size: int, settings: FitSettings, generator: torch.Generator) -> None:
        super().__init__()
        d, self.activation = settings.dimension, settings.activation
        shapes = {"w1": (d, size), "b1": (d,), "w2": (d, d), "b2": (d,), "u": (size, d)}
        self.weights = nn.ParameterDict(
            {
                name: torch.empty(shape).normal_(0, settings.std, generator=generator)
                for name, shape in shapes.items()
            }
        )

    def down(self, difference: Tensor) -> Tensor:
        """The code (..., d) of a difference (..., n)."""
        return self.encoder()(difference)

    def encoder(self) -> Encoder:
        """Proj_down, on the weights as they are."""
        named = {name: self.weights[name] for name in ("w1", "b1", "w2", "b2")}
        return Encoder(**named, activation=self.activation)

    def up(self, code: Tensor) -> Tensor:
        """The difference (..., n) of a code (..., d)."""
        return nn.functional.linear(code, self.weights["u"])


def fit(
    solutions: Solutions,
    settings: FitSettings,
    losses: Callable[[int, int], Losses] | None = None,
    on_step: Callable[[int, float, float], None] | None = None,
) -> Subspace:
    """Learns a subspace that all methods share. A step takes one task i and minimises

        sum_t L_i(theta_t^init + U_t I) + lambda sum_t || D_t - U_t I_t ||
        I_t = Proj_down_t(D_t),    I = alpha_1 I_1 + ... + alpha_T I_T

    with D_t the difference of method t on the task, L_i the loss of a mini-batch of the task, and
    alpha drawn anew: alpha_1 ~ U(0, 1), alpha_2 ~ U(0, 1 - alpha_1), ..., the last what is left. So
    one interpolated code is decoded by every method, and each code by its own.

    The methods' forward passes of the task's loss are taken one after the other; weights and
    gradients take 16 n d bytes for each method.

    Args:
        solutions: of the tasks to learn from.
        settings: how.
        losses: (task, step) -> the losses of a mini-batch of the task; without them the space
            learns to reconstruct alone.
        on_step: is called with the step, the loss of the task and the reconstruction loss.

    Raises:
        SubspaceError: a loss that is not finite.

    Source: Yi et al., "Different Tunes Played with Equal Skill", 2022, arXiv:2210.13311, with the
    released code where it is more exact (order of the interpolation, norm, initial values).
    Differs: in the released multi-task code every method's second layer but LoRA's is LoRA's; here
    each has its own.
    """
    from transformers.optimization import Adafactor

    draw = torch.Generator().manual_seed(settings.seed)
    maps = {n: Maps(len(solutions.starts[n]), settings, draw) for n in solutions.methods}
    weights = [p for one in maps.values() for p in one.parameters()]
    optimizer = Adafactor(
        weights, lr=settings.learning_rate, scale_parameter=False, relative_step=False
    )
    for step, task in zip(range(settings.steps), _order(len(solutions.tasks), draw), strict=False):
        rows = {name: read([task])[0].float() for name, read in solutions.read.items()}
        codes = {name: maps[name].down(row) for name, row in rows.items()}
        apart = [_distance(maps[n].up(codes[n]) - rows[n], settings.squared) for n in maps]
        reconstruction = torch.stack(apart).sum()
        shares = _shares(len(maps), draw)
        code = torch.stack([share * codes[name] for share, name in zip(shares, maps, strict=True)])
        total = _step(
            solutions.starts, maps, code.sum(dim=0), settings.weight * reconstruction,
            losses(task, step) if losses else None,
        )  # fmt: skip
        left = float(reconstruction.detach())
        if not (math.isfinite(total) and math.isfinite(left)):
            raise SubspaceError(
                f"step {step + 1} has the losses {total:g} and {left:g}; lower learning_rate (now "
                f"{settings.learning_rate:g})"
            )
        optimizer.step()
        optimizer.zero_grad()
        if on_step:
            on_step(step + 1, total, left)
    return _space(solutions, maps, settings)


def _step(
    starts: Mapping[str, Tensor], maps: Mapping[str, Maps], code: Tensor, rest: Tensor,
    losses: Losses | None,
) -> float:  # fmt: skip
    """Leaves the gradients of all losses; the loss of the task."""
    if losses is None:
        rest.backward()
        return 0.0
    leaf, total = code.detach().requires_grad_(), 0.0
    for name, one in maps.items():
        loss = losses(name, starts[name] + one.up(leaf))
        loss.backward()
        total += float(loss.detach())
    assert leaf.grad is not None
    torch.autograd.backward([rest, code], [torch.ones_like(rest), leaf.grad])
    return total


def _order(tasks: int, draw: torch.Generator) -> Iterator[int]:
    """Every task once in each round, in a new order."""
    while True:
        yield from torch.randperm(tasks, generator=draw).tolist()


def _shares(methods: int, draw: torch.Generator) -> list[float]:
    """Positive numbers that add up to 1, each uniform in what those before it have left."""
    left, shares = 1.0, []
    for _ in range(methods - 1):
        shares.append(left * float(torch.rand((), generator=draw)))
        left -= shares[-1]
    return [*shares, left]


def _distance(difference: Tensor, squared: bool) -> Tensor:
    return difference.square().sum() if squared else difference.norm()


def _space(solutions: Solutions, maps: Mapping[str, Maps], settings: FitSettings) -> Subspace:
    ups: dict[str, Up] = {name: Matrix(one.weights["u"].detach()) for name, one in maps.items()}
    with torch.no_grad():
        codes = {
            name: torch.stack(
                [maps[name].down(read([i])[0].float()) for i in range(len(solutions.tasks))]
            )
            for name, read in solutions.read.items()
        }
    about = {"found": "learned", **asdict(settings)}
    downs = {name: one.requires_grad_(False).encoder() for name, one in maps.items()}
    return Subspace(ups, solutions.starts, codes, solutions.tasks, about, downs, solutions.deltas)
