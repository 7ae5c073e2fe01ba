"""Subspaces in folders.

`subspace.safetensors` holds starts, codes and maps, `subspace.json` the rest, and `starts/` the
delta of each method as it was before training, so that the folder is all that a backbone needs.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from deltune.errors import StoreError
from deltune.store import native
from deltune.subspace.maps import put_together, taken_apart
from deltune.subspace.space import Subspace

STEM = "subspace"


def save(space: Subspace, path: str | Path, overwrite: bool = False) -> Path:
    """Writes a subspace to a folder, whole or not at all.

    Raises:
        StoreError: the folder exists, or the disk refuses; nothing earlier is lost.
    """
    tensors: dict[str, Tensor] = {}
    methods: dict[str, dict[str, Any]] = {}
    for name, up in space.ups.items():
        kept, said = {"start": space.starts[name]}, {}
        if name in space.codes:
            kept["codes"] = space.codes[name]
        maps = {"up": up, "down": space.downs[name]} if name in space.downs else {"up": up}
        for part, made in maps.items():
            inside, said[part] = taken_apart(made)
            kept |= {f"{part}.{inner}": tensor for inner, tensor in inside.items()}
        tensors |= {f"{name}/{part}": tensor for part, tensor in kept.items()}
        methods[name] = {**said, "shapes": {part: list(t.shape) for part, t in kept.items()}}
    about = {
        "about": dict(space.about),
        "tasks": list(space.tasks),
        "methods": methods,
        "dimension": space.dimension,
        "deltas": sorted(space.deltas),
    }

    def starts(folder: Path) -> None:
        for name, place in space.deltas.items():
            shutil.copytree(place, folder / "starts" / name)

    native.write(path, tensors, about, overwrite, STEM, starts)
    return Path(path)


def load(path: str | Path) -> Subspace:
    """The subspace of a folder.

    Raises:
        StoreError: the folder holds none, or a damaged one.
    """
    about = native.read_about(path, STEM)
    try:
        methods: Mapping[str, dict[str, Any]] = about["methods"]
        shapes = {
            f"{name}/{part}": tuple(shape)
            for name, said in methods.items()
            for part, shape in said["shapes"].items()
        }
        tensors = native.read_tensors(path, shapes, STEM)
        pieces = {
            name: {part: tensors[f"{name}/{part}"] for part in said["shapes"]}
            for name, said in methods.items()
        }
        return Subspace(
            {name: _map("up", said, pieces[name]) for name, said in methods.items()},
            {name: kept["start"] for name, kept in pieces.items()},
            {name: kept["codes"] for name, kept in pieces.items() if "codes" in kept},
            tuple(about["tasks"]),
            about["about"],
            {n: _map("down", said, pieces[n]) for n, said in methods.items() if "down" in said},
            {name: Path(path) / "starts" / name for name in about["deltas"]},
        )
    except (AttributeError, KeyError, TypeError) as error:
        raise StoreError(
            f"`{path}/{STEM}.json` is incomplete or damaged: {error!r}; fit the subspace again"
        ) from None


def _map(part: str, said: Mapping[str, Any], kept: Mapping[str, Tensor]) -> Any:
    inside = {n.partition(".")[2]: t for n, t in kept.items() if n.startswith(f"{part}.")}
    return put_together(inside, said[part])
