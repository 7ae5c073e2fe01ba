"""Steps of the optimisers of several runs as one.

Runs whose parameters have the same shapes differ in numbers only. Their gradients are rows of one
matrix, and a step of AdamW for all is a few operations on it: each row has its own rate, clipping
and count of steps.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from deltune.mechanisms.piles import Pile, Piles
from deltune.training.optim import clipping
from deltune.training.run import Outcome, Run

MOST = 2**20
"""Trained numbers of a run whose step is joint, at most; more fill the machine by themselves."""


class JointSteps:
    """Steps of runs: joint where that is the same, elsewhere each by itself."""

    def __init__(self, piles: Piles) -> None:
        self._piles, self._turns = piles, 0
        self._groups: list[Group] = []

    def update(self, runs: Sequence[Run], due: Mapping[Run, Tensor]) -> dict[Run, Outcome]:
        """Steps those of the runs that are due, by their losses."""
        if self._turns == 1:  # to join states for piles of a single turn would take longer
            self._groups = list(_groups(self._piles, runs))
        self._turns += 1
        joint: dict[Run, Outcome] = {}
        for group in self._groups:
            joint |= group.update(due)
        own = {run: run.update(loss) for run, loss in due.items() if run not in joint}
        return joint | own

    def end(self) -> None:
        """Gives the optimisers' states memory of their own again."""
        for group in self._groups:
            group.end()
        self._groups, self._turns = [], 0


class Group:
    """Runs whose parameters are rows of the same piles.

    A run is a row of each matrix here: its gradients, means of gradients m and of their squares v,
    of all its parameters side by side, and each parameter's count of steps. The states of the runs'
    optimisers are views of these.
    """

    def __init__(self, runs: Sequence[Run], piles: Sequence[Pile]) -> None:
        self.runs, self.piles = runs, piles
        self.sizes = [pile.parts[0].numel() for pile in piles]
        self.betas, self.eps = _constants(runs[0])[0]
        own = [run.trainables.parameters for run in runs]
        optimizers = [run.optimizer for run in runs]
        self._states = [[o.state[p] for p in ps] for o, ps in zip(optimizers, own, strict=True)]
        self._options = [_options(o, ps) for o, ps in zip(optimizers, own, strict=True)]
        self.m, self.v = self._joined("exp_avg"), self._joined("exp_avg_sq")
        self.counts = self._joined("step")

    def update(self, due: Mapping[Run, Tensor]) -> dict[Run, Outcome]:
        """A step; none where a run is not due, or lacks a gradient, or is not finite."""
        found = [pile.take() for pile in self.piles]
        gradients = [one.reshape(len(one), -1) for one in found if one is not None]
        if len(gradients) < len(found) or any(run not in due for run in self.runs):
            return {}
        gradient = torch.cat(gradients, 1)
        losses = torch.stack([due[run] for run in self.runs])
        norms = torch.linalg.vector_norm(gradient, dim=1)
        # As in a run by itself, the only point of a step that waits for the device.
        rows = torch.stack([losses, *(t.to(losses) for t in (norms, *self.counts.T))])
        loss, norm, *counts = rows.tolist()
        outcomes = [Outcome(*one) for one in zip(loss, norm, strict=True)]
        if not all(one.finite for one in outcomes) or any(one != counts[0] for one in counts):
            return {}
        self._step(gradient, norm, counts[0])
        return dict(zip(self.runs, outcomes, strict=True))

    @torch.no_grad()
    def _step(self, g: Tensor, norms: Sequence[float], counts: Sequence[float]) -> None:
        """AdamW, a row for each run, at its step t with its rate r and decay d:

        w <- (1 - r d) w - r / (1 - b1^t) m / (sqrt(v) / sqrt(1 - b2^t) + eps)
        """
        b1, b2 = self.betas
        columns = [
            [clipping(run.settings.max_grad_norm, norm), (1 - b2 ** (count + 1)) ** 0.5]
            + [-one["lr"] / (1 - b1 ** (count + 1)) for one in own]
            + [1 - one["lr"] * one["weight_decay"] for one in own]
            for run, own, norm, count in zip(self.runs, self._options, norms, counts, strict=True)
        ]
        made = torch.tensor(columns, dtype=g.dtype, device=g.device).T[..., None]
        clips, roots, (rates, kept) = made[0], made[1], made[2:].chunk(2)
        self.counts += 1
        g *= clips
        self.m.lerp_(g, 1 - b1)
        self.v.mul_(b2).addcmul_(g, g, value=1 - b2)
        below = self.v.sqrt().div_(roots).add_(self.eps)
        changes = torch.div(self.m, below, out=below).split(self.sizes, 1)
        for pile, change, rate, keep in zip(self.piles, changes, rates, kept, strict=True):
            pile.whole.view(change.shape).mul_(keep).addcmul_(change, rate)
            # What was made of a parameter is kept until it is written; its whole is another tensor.
            torch.autograd.graph.increment_version(pile.parts)

    def end(self) -> None:
        for state in (state for states in self._states for state in states):
            state |= {name: value.clone() for name, value in state.items()}

    def _joined(self, name: str) -> Tensor:
        """(runs, numbers) of the states, which become views of it."""
        held = [[one[name] for one in states] for states in self._states]
        joined = torch.stack([torch.cat([one.flatten() for one in row]) for row in held])
        for states, old, row in zip(self._states, held, joined, strict=True):
            parts = row.split([one.numel() for one in old])
            for state, one, part in zip(states, old, parts, strict=True):
                state[name] = part.view(one.shape)
        return joined


def _groups(piles: Piles, runs: Sequence[Run]) -> Iterator[Group]:
    """Those whose joint step is that of each."""
    alike: dict[object, list[Run]] = {}
    for run in filter(_plain, runs):
        parameters = run.trainables.parameters
        kinds = tuple((p.shape, p.dtype, p.device) for p in parameters)
        alike.setdefault((kinds, *_constants(run)), []).append(run)
    for members in (members for members in alike.values() if len(members) > 1):
        parts = zip(*(run.trainables.parameters for run in members), strict=True)
        made = [piles.pile(own) for own in parts]
        found = [pile for pile in made if pile is not None]
        if len(found) == len(made):
            yield Group(members, found)


def _plain(run: Run) -> bool:
    """Whether a step of the run is nothing but AdamW, of few numbers, and not the first."""
    parameters, optimizer = run.trainables.parameters, run.optimizer
    if type(optimizer) is not AdamW or not run.course.idle or run.trainables.count > MOST:
        return False
    # Half precision would be rounded between the operations, which a fused step does not do.
    exact = {p.dtype for p in parameters} in ({torch.float32}, {torch.float64})
    same = len({p.device for p in parameters}) == len(_constants(run)) == 1
    return exact and same and all(p in optimizer.state for p in parameters)


def _options(optimizer: Optimizer, parameters: Sequence[Tensor]) -> list[dict[str, Any]]:
    """The group of each parameter."""
    found = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    return [found[id(p)] for p in parameters]


def _constants(run: Run) -> list[tuple[tuple[float, float], float]]:
    """Betas and eps of the groups of parameters, each once."""
    groups = run.optimizer.param_groups
    return list(dict.fromkeys((group["betas"], group["eps"]) for group in groups))
