"""What units do with torch modules: paths, hidden parameters, inputs and outputs."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from deltune.sites.packed import numbers


class Node(nn.Module):
    """A level of the tree that mirrors the backbone's module paths."""


def place(tree: nn.Module, path: str, module: nn.Module) -> None:
    """Puts `module` at a path below `tree`, making the levels between.

    Works on `_modules`, since a path may hold a name that `nn.Module` uses for itself.
    """
    *above, last = path.split(".")
    for name in above:
        level = tree._modules.get(name)
        if level is None:
            level = tree._modules[name] = Node()
            level.__dict__["training"] = tree.training
        tree = level
    earlier = tree._modules.get(last)
    if earlier is not None:
        module._modules.update(earlier._modules)
    module.__dict__["training"] = tree.training
    tree._modules[last] = module


def at(root: nn.Module, path: str) -> nn.Module:
    """`root.get_submodule(path)`, without its checks: a delta has hundreds of paths to follow."""
    for name in path.split(".") if path else ():
        below = root._modules[name]
        assert below is not None
        root = below
    return root


ORIGINALS = "_originals"


def pretrained(owner: nn.Module, name: str) -> Tensor:
    """A parameter of the backbone as it was given, also while a delta is merged into it."""
    value = owner.__dict__.get(ORIGINALS, owner._parameters).get(name)
    return numbers(owner, owner._parameters.get(name) if value is None else value)


class Shadow:
    """Lets a module see changed parameters while its forward runs, without touching them.

    An entry in the instance dictionary hides the registered parameter of the same name. Entries of
    several deltas add up, since each starts from what it sees.
    """

    @staticmethod
    def cast(owner: nn.Module, name: str, change: Tensor) -> None:
        """Hides `owner.name` behind `owner.name + change`."""
        seen = getattr(owner, name)
        owner.__dict__[name] = seen + change.to(seen.dtype)

    @staticmethod
    def replace(owner: nn.Module, name: str, value: Tensor) -> None:
        """Hides `owner.name` behind `value`."""
        owner.__dict__[name] = value.to(getattr(owner, name).dtype)

    @staticmethod
    def lift(owner: nn.Module, name: str) -> None:
        """Shows the registered parameter again."""
        owner.__dict__.pop(name, None)


def matched(x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the dtype of `x`; autocast, where it is on, does its own casting."""
    if torch.is_autocast_enabled(x.device.type):
        return tensors
    return tuple(t.to(x.dtype) for t in tensors)


def first_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The tensor that a module was called with."""
    if args:
        return args[0]
    return kwargs["hidden_states"] if "hidden_states" in kwargs else next(iter(kwargs.values()))


def changed_output(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The output of a module with its main tensor changed: a tensor, or the first of a tuple."""
    if isinstance(output, Tensor):
        return change(output)
    return (change(output[0]), *output[1:])
