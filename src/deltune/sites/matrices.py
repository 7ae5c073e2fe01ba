"""Single modules: which hold a matrix, of what shape, and who reads it."""

from typing import Any

from torch import nn

from deltune.sites import quirks

Draft = dict[str, Any]
"""The fields of a site that is not finished yet."""


def is_matrix(module: nn.Module) -> bool:
    """Whether a module's `weight` has two or more dimensions."""
    weight = module._parameters.get("weight")
    return weight is not None and weight.ndim >= 2


def matrix(path: str, module: nn.Module) -> Draft:
    """A module's whole weight matrix, as (out, in)."""
    weight = module._parameters["weight"]
    assert weight is not None
    shape = tuple(weight.shape)
    if isinstance(module, nn.Embedding):
        about: Draft = {"kind": "embedding", "shape": (shape[1], shape[0]), "transposed": True}
    elif isinstance(module, nn.Linear):
        about = {"kind": "linear", "shape": shape, "width": shape[0]}
    elif type(module).__name__ == "Conv1D":
        about = {"kind": "conv1d", "shape": shape[::-1], "transposed": True, "width": shape[1]}
    else:
        shape = (shape[0], weight.numel() // shape[0])
        about = {"kind": "dense", "shape": shape, "width": shape[0]}
    about["path"] = path
    return about


def reader(path: str, modules: dict[str, nn.Module]) -> str:
    """The module whose forward reads the parameters of `path`: itself, or a parent that uses them
    without calling it."""
    parent, _, name = path.rpartition(".")
    inside = isinstance(modules.get(parent), nn.MultiheadAttention)
    return parent if path and (inside or name in quirks.READ_BY_PARENT) else path


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalises, by the name of its class."""
    return "norm" in type(module).__name__.lower()


def has_experts(module: nn.Module) -> bool:
    """Whether a module holds 3-D weights (experts, out, in)."""
    return any(w is not None and w.ndim == 3 for w in module._parameters.values())
