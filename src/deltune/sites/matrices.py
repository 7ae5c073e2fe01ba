"""Single modules: which hold a matrix, of what shape, and who reads it."""

from math import prod
from typing import Any

from torch import Tensor, nn

from deltune.sites import quirks
from deltune.sites.packed import declared, meant, packed

Draft = dict[str, Any]
"""The fields of a site that is not finished yet."""


def is_matrix(module: nn.Module) -> bool:
    """Whether a module's `weight` has two or more dimensions, or it is a linear map without one."""
    weight = module._parameters.get("weight")
    return declared(module) if weight is None else weight.ndim >= 2


def matrix(path: str, module: nn.Module) -> Draft:
    """A module's whole weight matrix, as (out, in)."""
    weight = module._parameters.get("weight")
    if weight is None or packed(weight):
        return _packed(path, module, weight)
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


def _packed(path: str, module: Any, weight: Tensor | None) -> Draft:
    """The same where the module has its numbers in another form."""
    if declared(module):
        shape = (module.out_features, module.in_features)
        return {"path": path, "kind": "linear", "shape": shape, "width": shape[0], "packed": True}
    assert weight is not None
    out, *into = meant(weight)
    shape = (out, prod(into))
    if isinstance(module, nn.Embedding):
        shape = (module.embedding_dim, module.num_embeddings)
        return {"path": path, "kind": "embedding", "shape": shape, "transposed": True,
                "packed": True}  # fmt: skip
    return {"path": path, "kind": "dense", "shape": shape, "width": out, "packed": True}


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
