"""What methods ask of training beyond plain optimiser steps, called at the right moments."""

import hashlib
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from functools import cached_property

import torch
from torch import nn

from deltune.container import container
from deltune.mechanisms.unit import Losses, Mechanism, Rate, Unit
from deltune.tree import Tree


class Course:
    """The schedules, penalties, masks and rates of a model's deltas in training.

    The library's loop and `DeltaCallback` use it; so can any other loop:

        with Course(model, seed=0) as course:
            course.prepare(losses)
            for step in range(steps):
                course.before_step(step, steps)
                loss.backward()
                course.after_backward()
                optimizer.step()
                course.after_step()

    Inside the `with` block the model may be trained; outside, a method that asks for more than
    optimiser steps refuses.

    Args:
        model: the model with its deltas. Those count that act and have trainable tensors.
        seed: of all random draws, which are a function of it and of the step.
    """

    def __init__(self, model: nn.Module, seed: int = 0) -> None:
        held, self.seed = container(model), seed
        self.trees: list[Tree] = [
            tree
            for tree in (held.trees() if held else ())
            if tree.enabled and any(parameter.requires_grad for parameter in tree.parameters())
        ]
        self.parts: list[tuple[Mechanism, list[Unit]]] = [
            member for tree in self.trees for member in tree.trained() if member[0].asks
        ]
        self.step, self.steps = 0, 1

    @property
    def idle(self) -> bool:
        """Whether plain optimiser steps are all that is asked for."""
        return not self.parts

    def __enter__(self) -> "Course":
        for tree in self.trees:
            tree.driven = True
        return self

    def __exit__(self, *failure: object) -> None:
        for tree in self.trees:
            tree.driven = False

    def prepare(self, losses: Losses) -> None:
        """Lets the methods look at training examples before the first step."""
        for spec, units in self.parts:
            spec.prepare(units, losses)
        for tree in self.trees:
            for parameter in tree.parameters():
                parameter.grad = None  # what looking at losses left behind

    def before_step(self, step: int, steps: int) -> None:
        """Before the forward pass of step `step` of `steps`, counted from 0."""
        self.step, self.steps = step, steps
        for spec, units in self.parts:
            spec.before_step(units, step, steps, self._seed())

    def after_backward(self) -> None:
        """Adds the gradients of penalties, then lets the methods change gradients."""
        found = [spec.penalty(units) for spec, units in self.parts]
        penalties = [penalty for penalty in found if penalty is not None]
        if penalties:
            torch.stack([penalty.float() for penalty in penalties]).sum().backward()
        for spec, units in self.parts:
            spec.after_backward(units, self._seed())

    def after_step(self) -> None:
        """After the optimiser has stepped."""
        with torch.no_grad():
            for spec, units in self.parts:
                spec.after_step(units, self.step, self.steps)

    @property
    def settled(self) -> bool:
        """Whether every method has become what its spec says, so that an evaluation counts."""
        return all(spec.settled(units) for spec, units in self.parts)

    def rate(self, parameter: nn.Parameter) -> Rate:
        """How a tensor is to be stepped."""
        return self._rates.get(id(parameter), Rate())

    def asks_of(self, parameter: nn.Parameter) -> bool:
        """Whether a tensor belongs to a method that asks for more; it may skip a step then."""
        return id(parameter) in {id(p) for _, units in self.parts for p in _owned(units)}

    @cached_property
    def _rates(self) -> dict[int, Rate]:
        return {
            id(parameter): rate
            for tree in self.trees
            for spec, units in tree.members()
            for glob, rate in spec.rates().items()
            for unit in units
            for owner in (unit, unit.shared)
            if owner is not None
            for own, parameter in owner._parameters.items()
            if fnmatchcase(own, glob)
        }

    def _seed(self) -> int:
        digest = hashlib.blake2b(f"{self.seed} {self.step}".encode(), digest_size=8).digest()
        return int.from_bytes(digest) >> 1


def _owned(units: Sequence[Unit]) -> Iterator[nn.Parameter]:
    for unit in units:
        yield from unit.parameters(recurse=False)
        if unit.shared is not None:
            yield from unit.shared.parameters()
