"""Checkpoints: folders of safetensors and JSON that appear whole or not at all.

`<folder>/step-<N>/` holds `model.safetensors` (trainable tensors only), `best.safetensors`
(the same at the best evaluation), `optimizer.safetensors` and `state.json`. Random numbers and the
order of the data are functions of seed and step, so the step is all there is to keep of them.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from deltune.errors import TrainError

Tensors = dict[str, Tensor]

_PREFIX = "step-"


def write(folder: Path, step: int, files: Mapping[str, Tensors], state: dict[str, Any]) -> Path:
    """Writes the checkpoint of a step, then deletes the older ones of this folder.

    Raises:
        TrainError: the disk refuses; the earlier checkpoint is still there.
    """
    path = folder / f"{_PREFIX}{step}"
    part = folder / f".{_PREFIX}{step}.part-{os.getpid()}"
    try:
        part.mkdir(parents=True)
        for name, tensors in files.items():
            save_file(
                {key: t.detach().contiguous() for key, t in tensors.items()},
                part / f"{name}.safetensors",
            )
        (part / "state.json").write_text(json.dumps(state))
        _flush(part)
        part.rename(path)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(part, ignore_errors=True)
        raise TrainError(
            f"the checkpoint of step {step} could not be written to `{path}`: {error}; an earlier "
            "checkpoint is untouched; free space or make the folder writable, then start again"
        ) from error
    _sweep(folder, keep=path)
    return path


def newest(folder: Path) -> Path | None:
    """The checkpoint of the latest step in the folder."""
    found = [path for path in folder.glob(f"{_PREFIX}*") if _step(path) is not None]
    return max(found, key=lambda path: _step(path) or 0, default=None)


def read_state(path: Path) -> dict[str, Any]:
    """The JSON part of a checkpoint.

    Raises:
        TrainError: it is missing or damaged.
    """
    try:
        return json.loads((path / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise _damaged(path / "state.json", error) from error


def read_tensors(path: Path, name: str) -> Tensors:
    """One of a checkpoint's files of tensors.

    Raises:
        TrainError: it is missing or damaged.
    """
    file = path / f"{name}.safetensors"
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise _damaged(file, error) from error


def _damaged(file: Path, error: Exception) -> TrainError:
    return TrainError(
        f"`{file}` cannot be read: {error}; expected the file of a complete checkpoint; delete "
        f"`{file.parent}` to start from the beginning"
    )


def _step(path: Path) -> int | None:
    digits = path.name.removeprefix(_PREFIX)
    return int(digits) if digits.isdecimal() and (path / "state.json").is_file() else None


def _flush(part: Path) -> None:
    # Without this a power cut after the rename could leave the new name with empty files.
    for path in [*part.iterdir(), part]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _sweep(folder: Path, keep: Path) -> None:
    stale = [path for path in folder.glob(f"{_PREFIX}*") if _step(path) is not None]
    for path in [*stale, *folder.glob(f".{_PREFIX}*.part-*")]:
        if path != keep:
            shutil.rmtree(path, ignore_errors=True)
