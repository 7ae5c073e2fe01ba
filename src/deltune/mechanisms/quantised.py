"""Deltas on weights that are held in few bits: gradients through them, changes put into them."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from deltune.errors import AttachError, TrainError
from deltune.sites.packed import (
    REARRANGES,
    declared,
    different,
    kind,
    numbers,
    packed,
    passes,
    rearranges,
)
from deltune.sites.repacking import repacked


class Passage:
    """What is done so that gradients flow through the packed weights of a backbone.

    `still` are the modules that were kept from rearranging their weights, `dams` those through
    which no gradient flows.
    """

    def __init__(self) -> None:
        self.still: list[nn.Module] = []
        self.dams: list[nn.Module] = []

    def open(self, modules: Iterable[nn.Module]) -> None:
        """Lets gradients through, and notes where they do not flow all the same.

        Raises:
            AttachError: weights were rearranged already.
        """
        modules = list(modules)
        odd = [module for module in modules if different(module)]
        for module in odd:
            if rearranges(module):
                module.__dict__[REARRANGES] = False
                self.still.append(module)
        linear = {(type(m), type(m._parameters.get("weight"))): m for m in odd if declared(m)}
        if linear:
            known = (p for m in modules for p in m._parameters.values() if p is not None)
            dtype = next((p.dtype for p in known if not packed(p)), torch.float32)
            self.dams = [m for m in linear.values() if not passes(m, dtype)]

    def close(self) -> None:
        """Leaves the modules as they were."""
        for module in self.still:
            module.__dict__[REARRANGES] = True
        self.still.clear()

    def check(self, name: str, parameters: Iterable[nn.Parameter]) -> None:
        """Refuses to train where gradients do not flow.

        Raises:
            TrainError: one of the parameters of the delta `name` is to be trained.
        """
        if self.dams and any(parameter.requires_grad for parameter in parameters):
            raise TrainError(
                f"delta `{name}` is about to be trained, and no gradient flows through the "
                f"{_kind(self.dams[0])} weights of this model, which are for inference; quantise "
                "the weights alone, not the activations, or train on plain numbers and load the "
                "delta here with `force=True`"
            )


def changed(owner: nn.Module, original: nn.Parameter, changes: list[Tensor]) -> nn.Parameter:
    """A parameter with changes, computed in at least float32 and held as the original is."""
    wide = numbers(owner, original).detach()
    wide = wide.float() if wide.element_size() < 4 else wide
    for change in changes:
        wide = wide + change.to(wide.dtype)
    if packed(original):
        return repacked(original, wide, owner)
    return nn.Parameter(wide.to(original.dtype), requires_grad=False)


def check_mergeable(
    delta: str, owner: nn.Module, name: str, change: Tensor, requantise: bool
) -> None:
    """Refuses to put a change into a packed weight, saying what that would cost.

    Args:
        delta: its name.
        owner: the module.
        name: of the parameter.
        change: of its values.
        requantise: whether the cost is accepted.

    Raises:
        AttachError: it is not accepted, or a weight of this kind cannot be made.
    """
    weight = owner._parameters.get(name)
    if weight is None or not packed(weight):
        return
    change = change.detach().float()
    wanted = numbers(owner, weight).float() + change
    found = numbers(owner, repacked(weight, wanted, owner)).float()
    if requantise:
        return
    lost = float((found - wanted).norm() / change.norm().clamp(min=1e-30))
    raise AttachError(
        f"delta `{delta}` changes weights that are held as {kind(weight)}: merging adds to their "
        f"numbers and rounds these again, an error of {lost:.0%} of the change in the first one. "
        "Leave it unmerged; or load the model in plain numbers, load the delta there with "
        "`force=True`, and merge it there; or accept the error with `merge(requantise=True)`"
    )


def _kind(module: Any) -> str:
    return kind(module.weight) if "weight" in module._parameters else type(module).__name__
