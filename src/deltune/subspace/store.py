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
from deltune.subspace.linear import KINDS, Scaled
from deltune.subspace.space import Encoder, Matrix, Subspace, Up

STEM = "subspace"


def save(space: Subspace, path: str | Path, overwrite: bool = False) -> Path:
    """Writes a subspace to a folder, whole or not at all.

    Raises:
        StoreError: the folder exists, or the disk refuses; nothing earlier is lost.
    """
    tensors: dict[str, Tensor] = {}
    methods: dict[str, dict[str, Any]] = {}
    for name, up in space.ups.items():
        kept = {"start": space.starts[name], "codes": space.codes[name]}
        said: dict[str, Any] = {}
        if isinstance(up, Scaled):
            kind = next(kind for kind, made in KINDS.items() if isinstance(up.inner, made))
            said["up"] = {"kind": kind, "seed": up.inner.seed, "factor": up.factor}
        else:
            assert isinstance(up, Matrix)
            kept["up"] = up.weight
        if name in space.downs:
            down = space.downs[name]
            said["activation"] = down.activation
            kept |= {part: getattr(down, part) for part in ("w1", "b1", "w2", "b2")}
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
        ups = {name: _up(name, said, tensors, about["dimension"]) for name, said in methods.items()}
        downs = {
            name: Encoder(
                **{part: tensors[f"{name}/{part}"] for part in ("w1", "b1", "w2", "b2")},
                activation=said["activation"],
            )
            for name, said in methods.items()
            if "activation" in said
        }
        return Subspace(
            ups,
            {name: tensors[f"{name}/start"] for name in methods},
            {name: tensors[f"{name}/codes"] for name in methods},
            tuple(about["tasks"]),
            about["about"],
            downs,
            {name: Path(path) / "starts" / name for name in about["deltas"]},
        )
    except (AttributeError, KeyError, TypeError) as error:
        raise StoreError(
            f"`{path}/{STEM}.json` is incomplete or damaged: {error!r}; fit the subspace again"
        ) from None


def _up(name: str, said: dict[str, Any], tensors: Mapping[str, Tensor], dimension: int) -> Up:
    if "up" not in said:
        return Matrix(tensors[f"{name}/up"])
    drawn = said["up"]
    size = tensors[f"{name}/start"].numel()
    return Scaled(KINDS[drawn["kind"]](size, dimension, drawn["seed"]), drawn["factor"])
