"""The learned subspace: encoders and decoders of all methods, trained together."""

import hashlib
import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deltune.errors import SubspaceError
from deltune.subspace.maps import Curved, Diagonal, Encoder, Matrix, Up, detached
from deltune.subspace.settings import FitSettings
from deltune.subspace.solutions import Solutions
from deltune.subspace.space import Subspace
from deltune.training.progress import Saver
from deltune.training.trainables import Trainables
from deltune.vector import Layout

SAVE_SECONDS = 120.0
"""Between two checkpoints."""
Losses = Callable[[str, Tensor], Tensor]
"""(method, vector) -> the loss of one mini-batch with that vector in the model."""


class Maps(nn.Module):
    """The maps of one method: its decoder, and an encoder where it has solutions.

    Args:
        size: n_t.
        settings: dimension, decoder and encoder.
        draw: gives the weights at first.
        seed: of the Fastfood of a method without solutions, which has no encoder; None otherwise.
        sizes: of the tensors that have a Fastfood each; none if the vector has one.
    """

    def __init__(
        self, size: int, settings: FitSettings, draw: torch.Generator, seed: int | None = None,
        sizes: Sequence[int] = (),
    ) -> None:  # fmt: skip
        super().__init__()
        d, h, std = settings.dimension, settings.hidden, settings.std

        def parameters(shapes: Mapping[str, tuple[int, ...]]) -> nn.ParameterDict:
            return nn.ParameterDict(
                {n: torch.empty(s).normal_(0, std, generator=draw) for n, s in shapes.items()}
            )

        layers = {"w1": (d, size), "b1": (d,), "w2": (d, d), "b2": (d,)}
        kept = 4 if settings.activation == "tanh" else 2
        self.below = parameters(dict(list(layers.items())[:kept])) if seed is None else None
        self.make: Callable[..., Up] = Matrix
        if seed is not None:
            first = Diagonal.begin(size, d, seed, sizes)
            self.make = partial(Diagonal, size, d, seed, sizes=tuple(sizes))
            self.above = nn.ParameterDict({"gauss": first.gauss})
        elif settings.decoder == "linear":
            self.above = parameters({"weight": (size, d)})
        else:
            self.make = Curved
            self.above = parameters({"w2": (h, d), "b2": (h,), "w3": (size, h), "b3": (size,)})

    def encoder(self) -> Encoder:
        """Proj_down, on the weights as they are."""
        assert self.below is not None
        return Encoder(**self.below)

    def decoder(self) -> Up:
        """Proj_up, on the weights as they are."""
        return self.make(**self.above)

    def down(self, difference: Tensor) -> Tensor:
        """The code (..., d) of a difference (..., n)."""
        return self.encoder()(difference)

    def up(self, code: Tensor) -> Tensor:
        """The difference (..., n) of a code (..., d)."""
        return self.decoder().project(code)


def fit(
    solutions: Solutions,
    settings: FitSettings,
    losses: Callable[[int, int], Losses] | None = None,
    on_step: Callable[[int, float, float], None] | None = None,
    decoded: Mapping[str, Tensor] | None = None,
    folder: Path | None = None,
    layouts: Mapping[str, Layout] | None = None,
    device: torch.device | None = None,
) -> Subspace:
    """Learns a subspace that all methods share. A step takes one task i and minimises

        sum_t L_i(theta_t^init + U_t I) + lambda sum_t || D_t - U_t I_t ||
        I_t = Proj_down_t(D_t),    I = alpha_1 I_1 + ... + alpha_T I_T

    with D_t the difference of method t on the task, L_i the loss of a mini-batch of the task, and
    alpha drawn anew: alpha_1 ~ U(0, 1), alpha_2 ~ U(0, 1 - alpha_1), ..., the last what is left;
    with `interpolation="uniform"` evenly from all that are positive and add up to 1. So one
    interpolated code is decoded by every method, and each code by its own.

    The maps after the last step are kept: nothing is validated on the way.

    The methods' forward passes of the task's loss are taken one after the other; weights and
    gradients take 16 n d bytes for each method.

    A method may be there without solutions: it decodes the interpolated code with Fastfood, whose
    diagonal alone is learned, from its L_i. Full fine-tuning has room in a space so.

    Args:
        solutions: of the tasks to learn from.
        settings: how.
        losses: (task, step) -> the losses of a mini-batch of the task; without them the space
            learns to reconstruct alone.
        on_step: is called with the step, the loss of the task and the reconstruction loss.
        decoded: method without solutions -> its vector before training.
        folder: of checkpoints, one every two minutes; where one lies there already, the fit goes on
            from it and ends as it would have without a break. One takes 8 n d bytes of disk for
            each method, and as much memory while it is written.
        layouts: of the `decoded` methods, where each tensor has a Fastfood of its own
            (`scope="tensor"`).
        device: where the maps are learned, and so the vectors lie that `losses` are asked for; the
            CPU if not given. The space is on the CPU.

    Raises:
        SubspaceError: a loss that is not finite; a method that could learn nothing, or whose
            tensors are not known.
        TrainError: the checkpoint is of another fit, or damaged.

    Source: Yi et al., "Different Tunes Played with Equal Skill", 2022, arXiv:2210.13311, with the
    released code where it is more exact (order and draw of the interpolation, norm, initial
    values).
    Differs: in the released multi-task code the adapter's second layer is LoRA's; here each method
    has its own. The released code keeps the maps with the best mean dev metric of the methods,
    measured at interpolations drawn at random; here the last are kept.

    With one method, `activation="none"`, `decoder="curved"`, `distance="mean"` and a weight of 200
    the loss is that of the multi-task subspace finding of Qin et al., "Exploring Universal
    Intrinsic Task Subspace via Prompt Tuning", 2021, arXiv:2110.07867.
    Differs: Adafactor at a constant rate, where its released code has AdamW with a warm-up over 6 %
    of the steps and a linear decay; gradients are not clipped, there at a norm of 0.1; labels are
    not smoothed unless `losses` does it, there by 0.1; what is encoded and decoded is the prompt's
    difference from its start, there the prompt.
    """
    from transformers.optimization import Adafactor

    draw = torch.Generator().manual_seed(settings.seed)
    maps = {n: Maps(len(solutions.starts[n]), settings, draw) for n in solutions.methods}
    others = decoded or {}
    _check_decoded(others, maps, losses is not None)
    every = maps | _decoding(others, settings, draw, layouts or {})
    device = device or torch.device("cpu")
    starts = {name: one.to(device) for name, one in {**solutions.starts, **others}.items()}
    trainables = Trainables(nn.ModuleList(every.values()).to(device))
    optimizer = Adafactor(
        trainables.parameters, lr=settings.learning_rate, scale_parameter=False, relative_step=False
    )
    saver = Saver(folder, _identity(solutions, others, settings) if folder else {})
    progress, saved = saver.resume(trainables, optimizer), time.monotonic()
    for step, task in zip(range(settings.steps), _order(len(solutions.tasks), draw), strict=False):
        shares = _shares(len(maps), draw, settings.interpolation)
        if step < progress.step:  # its random numbers alone were needed
            continue
        rows = {n: read([task])[0].float().to(device) for n, read in solutions.read.items()}
        code, reconstruction = _coded(rows, maps, shares, settings.distance)
        total = _step(
            starts, every, code, settings.weight * reconstruction,
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
        progress.step = step + 1
        if time.monotonic() - saved >= SAVE_SECONDS:
            saver.save(progress, trainables, optimizer)
            saved = time.monotonic()
        if on_step:
            on_step(step + 1, total, left)
    return _space(solutions, every, starts, settings)


def _identity(
    solutions: Solutions, others: Mapping[str, Tensor], settings: FitSettings
) -> dict[str, Any]:
    """What must be the same when a fit goes on."""
    digests = {}
    for name, start in {**solutions.starts, **others}.items():
        digest = hashlib.blake2b(start.float().cpu().numpy().tobytes(), digest_size=16)
        if read := solutions.read.get(name):
            for place in range(len(solutions.tasks)):
                digest.update(read([place])[0].float().numpy().tobytes())
        digests[name] = digest.hexdigest()
    tasks = {name: str(place) for place, name in enumerate(solutions.tasks)}
    return {"settings": settings.to_json(), "solutions": digests, "tasks": tasks}


def _coded(
    rows: Mapping[str, Tensor], maps: Mapping[str, Maps], shares: list[float], distance: str
) -> tuple[Tensor, Tensor]:
    """The interpolated code of a task's solutions (d), and the loss of reconstruction."""
    codes = {name: maps[name].down(row) for name, row in rows.items()}
    apart = [_distance(maps[n].up(codes[n]) - rows[n], distance) for n in maps]
    code = torch.stack([share * codes[name] for share, name in zip(shares, maps, strict=True)])
    return code.sum(dim=0), torch.stack(apart).sum()


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


def _shares(methods: int, draw: torch.Generator, how: str) -> list[float]:
    """Positive numbers that add up to 1: each uniform in what those before it have left, or the
    gaps between sorted uniform numbers, which are uniform over all such."""
    drawn = [float(torch.rand((), generator=draw)) for _ in range(methods - 1)]
    if how == "uniform":
        ends = [0.0, *sorted(drawn), 1.0]
        return [end - start for start, end in itertools.pairwise(ends)]
    left, shares = 1.0, []
    for one in drawn:
        shares.append(left * one)
        left -= shares[-1]
    return [*shares, left]


def _distance(difference: Tensor, how: str) -> Tensor:
    if how == "norm":
        return difference.norm()
    return difference.square().sum() if how == "squared" else difference.square().mean()


def _check_decoded(others: Mapping[str, Tensor], maps: Mapping[str, Maps], told: bool) -> None:
    for name in others:
        if name in maps:
            raise SubspaceError(
                f"`{name}` has solutions in the space; a method that only decodes has none"
            )
        if not told:
            raise SubspaceError(
                f"`{name}` has no solutions and there are no losses to learn its map from; give "
                "`losses`"
            )


def _decoding(
    others: Mapping[str, Tensor], settings: FitSettings, draw: torch.Generator,
    layouts: Mapping[str, Layout],
) -> dict[str, Maps]:  # fmt: skip
    """The maps of the methods that have no solutions."""
    sizes, found = _sizes(others, settings, layouts), {}
    for place, (name, start) in enumerate(others.items()):
        found[name] = Maps(len(start), settings, draw, settings.seed + 1009 * place, sizes[name])
    return found


def _sizes(
    others: Mapping[str, Tensor], settings: FitSettings, layouts: Mapping[str, Layout]
) -> dict[str, tuple[int, ...]]:
    """method -> the sizes of its tensors, where they matter."""
    if settings.scope == "global":
        return dict.fromkeys(others, ())
    for name, start in others.items():
        known = layouts[name].size if name in layouts else None
        if known != len(start):
            what = "is not given" if known is None else f"has {known:,} numbers"
            raise SubspaceError(
                f"`scope` is `tensor` and the layout of `{name}`, whose vector has {len(start):,} "
                f"numbers, {what}; give `layouts` with that of its delta"
            )
    return {name: tuple(slot.size for slot in layouts[name]) for name in others}


def _space(
    solutions: Solutions, maps: Mapping[str, Maps], starts: Mapping[str, Tensor],
    settings: FitSettings,
) -> Subspace:  # fmt: skip
    for one in maps.values():
        one.requires_grad_(False).cpu()
    starts = {name: start.cpu() for name, start in starts.items()}
    ups = {name: detached(one.decoder()) for name, one in maps.items()}
    downs = {name: detached(maps[name].encoder()) for name in solutions.methods}
    tasks = range(len(solutions.tasks))
    codes = {
        name: torch.stack([downs[name](read([i])[0].float()) for i in tasks])
        for name, read in solutions.read.items()
    }
    about = {"found": "learned", **asdict(settings)}
    return Subspace(ups, starts, codes, solutions.tasks, about, downs, solutions.deltas)
