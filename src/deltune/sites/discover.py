"""The atlas of a model: every place that can be addressed."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from deltune.sites.blocks import block_sites
from deltune.sites.matrices import is_matrix, matrix, reader
from deltune.sites.site import Site

DELTAS = "deltas"
_GIVES = "get_input_embeddings"


@dataclass
class Atlas:
    """Everything of a model that can be addressed."""

    model: nn.Module
    modules: dict[str, nn.Module]
    sites: list[Site] = field(default_factory=list)
    heads: tuple[str, ...] = ()

    def roles(self) -> list[str]:
        """The roles that this model has, in model order."""
        return list(dict.fromkeys(site.role for site in self.sites if site.role))

    def in_head(self, path: str) -> bool:
        """Whether a module belongs to a newly initialised task head."""
        return path.partition(".")[0] in self.heads


def walk(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The model's own modules with their paths, each once, deltas left out."""
    seen, stack = set(), [("", model)]
    while stack:
        path, module = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield path, module
        prefix = path + "." if path else ""
        for name, child in reversed(module._modules.items()):
            if child is not None and not (path == "" and name == DELTAS):
                stack.append((prefix + name, child))


def discover(model: nn.Module) -> Atlas:
    """The atlas of a model: its modules, and its sites with their roles."""
    atlas = Atlas(model, dict(walk(model)))
    matrices = {path for path, module in atlas.modules.items() if is_matrix(module)}
    atlas.sites += block_sites(atlas.modules, matrices)
    atlas.heads = _heads(model)
    matrices.difference_update(site.path for site in atlas.sites)
    atlas.sites += _rest(atlas, [path for path in atlas.modules if path in matrices])
    order = {path: i for i, path in enumerate(atlas.modules)}
    atlas.sites.sort(key=lambda site: order[site.path])
    return atlas


def _heads(model: Any) -> tuple[str, ...]:
    """Names of task heads: children of the root outside a classification model's body."""
    body = getattr(model, "base_model_prefix", "")
    if not body or body not in model._modules or not hasattr(model, "get_output_embeddings"):
        return ()
    if model.get_output_embeddings() is not None:
        return ()
    return tuple(
        name
        for name, child in model._modules.items()
        if child is not None
        and name not in (body, DELTAS)
        and any(True for _ in child.parameters())
    )


def _rest(atlas: Atlas, paths: list[str]) -> Iterator[Site]:
    """Embeddings, heads, and every other matrix, which only its name can reach."""
    embeddings = _token_embeddings(atlas, paths)
    out = getattr(atlas.model, "get_output_embeddings", lambda: None)()
    for path in paths:
        module = atlas.modules[path]
        draft = matrix(path, module)
        anchor = reader(path, atlas.modules)
        if anchor != path:
            draft |= {"kind": "dense", "anchor": anchor}
        if id(module) in embeddings:
            draft["role"] = "embed"
        elif atlas.in_head(path) or (out is not None and out is module):
            draft["role"] = "head"
        yield Site(**draft)


def _token_embeddings(atlas: Atlas, paths: list[str]) -> set[int]:
    """Of these modules, those that embed tokens; of one table in several, the ones called."""
    tables = set()
    kinds = [kind for kind in set(map(type, atlas.modules.values())) if hasattr(kind, _GIVES)]
    for module in atlas.modules.values() if kinds else ():
        if type(module) in kinds:
            try:
                found = getattr(module, _GIVES)()
            except (NotImplementedError, AttributeError):
                continue
            if isinstance(found, nn.Embedding):
                tables.add(id(found.weight))
    modules = {path: atlas.modules[path] for path in paths}
    found = {
        path: module
        for path, module in modules.items()
        if isinstance(module, nn.Embedding) and id(module.weight) in tables
    }
    called = {id(m) for path, m in found.items() if path.rpartition(".")[2] != "shared"}
    return called or {id(m) for m in found.values()}
