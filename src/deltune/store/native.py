"""The native format: a folder with `delta.safetensors` (tensors) and `delta.json` (the rest).

Written whole or not at all; read without pickle, and checked before it is trusted.
"""

import json
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from deltune.errors import StoreError

TENSORS, ABOUT = "delta.safetensors", "delta.json"
FORMAT = 1
MOST_JSON = 64 * 2**20


def write(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    about: Mapping[str, Any],
    overwrite: bool = False,
) -> None:
    """Writes a delta's folder: complete, or with the earlier one untouched.

    Raises:
        StoreError: the folder exists (and `overwrite` is off or it holds something else), or
            the disk refuses.
    """
    from safetensors.torch import save_file

    target = Path(path)
    _free(target, overwrite)
    aside = target.parent / f".{target.name}.{secrets.token_hex(4)}"
    try:
        aside.mkdir(parents=True)
        plain = {
            name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()
        }
        save_file(plain, aside / TENSORS, metadata={"format": "pt"})
        text = json.dumps({"format": FORMAT, **about}, separators=(",", ":"))
        (aside / ABOUT).write_text(text, encoding="utf-8")
        for name in (TENSORS, ABOUT):
            _sync(aside / name)
        _swap(aside, target)
    except Exception as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise StoreError(
            f"`{target}` could not be written ({error}); what was there before is untouched. "
            "Check free space and permissions"
        ) from error


def read_about(path: str | Path) -> dict[str, Any]:
    """The contents of `delta.json`.

    Raises:
        StoreError: no delta there, or one that this version does not read.
    """
    folder = Path(path)
    if not (folder / ABOUT).is_file() or not (folder / TENSORS).is_file():
        raise StoreError(_no_delta(folder))
    if (folder / ABOUT).stat().st_size > MOST_JSON:
        raise StoreError(f"`{folder / ABOUT}` is larger than any delta's description; not read")
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise StoreError(
            f"`{folder / ABOUT}` is not readable JSON ({error}); save the delta again"
        ) from None
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        found = about.get("format") if isinstance(about, dict) else type(about).__name__
        raise StoreError(
            f"`{folder / ABOUT}` has format {found!r}, this version reads {FORMAT}; "
            "use the version of deltune that wrote it"
        )
    return about


def read_tensors(path: str | Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The tensors of a delta, if they are exactly the expected ones.

    Args:
        path: the delta's folder.
        shapes: name -> shape of every tensor that must be there.

    Raises:
        StoreError: missing, unexpected or misshapen tensors, values that are not finite, a
            truncated file or one that is no safetensors.
    """
    from safetensors import SafetensorError, safe_open

    file = Path(path) / TENSORS
    try:
        with safe_open(file, framework="pt") as opened:
            found = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
            _compare(file, found, shapes)
            tensors = {name: opened.get_tensor(name) for name in shapes}
    except (SafetensorError, OSError) as error:
        raise StoreError(
            f"`{file}` is truncated or no safetensors file ({error}); pickle files are never read. "
            "Save or copy the delta again"
        ) from None
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise StoreError(
                f"`{file}`: `{name}` holds values that are not finite; the delta is damaged"
            )
    return tensors


def _compare(
    file: Path, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> None:
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    wrong = [n for n, shape in expected.items() if n in found and found[n] != tuple(shape)]
    if missing or extra or wrong:
        lines = [f"`{file}` does not hold this delta's tensors:"]
        lines += [f"  missing: {name} {tuple(expected[name])}" for name in missing[:5]]
        lines += [f"  unexpected: {name} {found[name]}" for name in extra[:5]]
        lines += [f"  shape of {n}: {found[n]}, expected {tuple(expected[n])}" for n in wrong[:5]]
        rest = len(missing) + len(extra) + len(wrong) - len(lines) + 1
        lines += [f"  and {rest} more"] if rest > 0 else []
        raise StoreError(
            "\n".join([*lines, "use the model and spec that the delta was saved from"])
        )


def _no_delta(folder: Path) -> str:
    if not folder.exists():
        return f"there is no folder `{folder}`; give the folder that `delta.save` wrote"
    names = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else [folder.name]
    if any(name.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl")) for name in names):
        return (
            f"`{folder}` holds pickled tensors ({', '.join(names[:4])}), which can run code when "
            "read and are refused; convert them to safetensors with the library that wrote them"
        )
    inside = ", ".join(names[:6]) or "nothing"
    return f"`{folder}` holds no delta ({TENSORS} and {ABOUT}), but: {inside}"


def _free(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not overwrite:
        raise StoreError(f"`{target}` exists; choose another folder or pass `overwrite=True`")
    if not (target / ABOUT).is_file():
        raise StoreError(f"`{target}` exists and is no delta; it is not overwritten")


def _swap(aside: Path, target: Path) -> None:
    old = target.parent / f"{aside.name}.old"
    if target.exists():
        os.rename(target, old)
    try:
        os.rename(aside, target)
    except OSError:
        if old.exists():
            os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)
    _sync(target.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
