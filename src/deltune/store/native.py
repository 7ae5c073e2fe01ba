"""The native format: a folder with `delta.safetensors` (tensors) and `delta.json` (the rest).

Written whole or not at all; read without pickle, and checked before it is trusted. What else is
kept so, a subspace, has another stem: `subspace.safetensors` and `subspace.json`.
"""

import json
import os
import secrets
import shutil
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
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
    stem: str = "delta",
    inside: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Writes a folder: complete, or with the earlier one untouched.

    Args:
        path: the folder.
        tensors: by name.
        about: plain JSON data.
        overwrite: whether an earlier folder of this stem may go.
        stem: what the folder is, and its files are called.
        inside: is given the folder before it is there for anyone, and may write more into it.

    Raises:
        StoreError: the folder exists (and `overwrite` is off or it holds something else), or
            the disk refuses.
    """
    files = (_tensors(stem), _about(stem))
    text = json.dumps({"format": FORMAT, **about}, separators=(",", ":"))
    write_files(path, files, tensors, text, overwrite, stem, inside)


def write_files(
    path: str | Path, files: tuple[str, str], tensors: Mapping[str, Tensor], text: str,
    overwrite: bool, what: str, inside: Callable[[Path], None] = lambda folder: None,
) -> None:  # fmt: skip
    """Writes a folder of a file of tensors and one of JSON, in any library's format.

    Args:
        path: the folder.
        files: their names.
        tensors: by name.
        text: the JSON.
        overwrite: whether an earlier folder with such a JSON file may go.
        what: the folder is, for messages.
        inside: may write more into it.

    Raises:
        StoreError: as `write`.
    """
    from safetensors.torch import save_file

    target = Path(path)
    _free(target, overwrite, what, files[1])
    aside = target.parent / f".{target.name}.{secrets.token_hex(4)}"
    try:
        aside.mkdir(parents=True)
        plain = {
            name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()
        }
        save_file(plain, aside / files[0], metadata={"format": "pt"})
        (aside / files[1]).write_text(text, encoding="utf-8")
        inside(aside)
        for path in aside.rglob("*"):
            _sync(path)
        _swap(aside, target)
    except Exception as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise StoreError(
            f"`{target}` could not be written ({error}); what was there before is untouched. "
            "Check free space and permissions"
        ) from error


def by_first(write: Callable[[], None], together: bool) -> None:
    """Writes, in the first of several processes if they do it `together`; they return, or raise
    what the first has raised, at the same time.

    Raises:
        StoreError: as `write`.
    """
    if not together:
        return write()
    from torch import distributed

    failed: list[StoreError | None] = [None]
    if distributed.get_rank() == 0:
        try:
            write()
        except StoreError as error:
            failed = [error]
    distributed.broadcast_object_list(failed, src=0)
    if failed[0] is not None:
        raise failed[0]


def read_about(path: str | Path, stem: str = "delta") -> dict[str, Any]:
    """The contents of `delta.json`, or of the JSON file of another stem.

    Raises:
        StoreError: no such folder, or one that this version does not read.
    """
    folder = Path(path)
    file = folder / _about(stem)
    if not file.is_file() or not (folder / _tensors(stem)).is_file():
        raise StoreError(_none_there(folder, stem))
    if file.stat().st_size > MOST_JSON:
        raise StoreError(f"`{file}` is larger than any {stem}'s description; not read")
    try:
        about = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise StoreError(
            f"`{file}` is not readable JSON ({error}); save the {stem} again"
        ) from None
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        found = about.get("format") if isinstance(about, dict) else type(about).__name__
        raise StoreError(
            f"`{file}` has format {found!r}, this version reads {FORMAT}; "
            "use the version of deltune that wrote it"
        )
    return about


def read_shapes(path: str | Path, stem: str = "delta") -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors of a delta, or of another stem, by name.

    Raises:
        StoreError: a truncated file or one that is no safetensors.
    """
    with _opened(path, stem) as opened:
        return _shapes(opened)


def read_tensors(
    path: str | Path, shapes: Mapping[str, tuple[int, ...]], stem: str = "delta"
) -> dict[str, Tensor]:
    """The tensors of a delta, or of another stem, if they are exactly the expected ones.

    Args:
        path: the folder.
        shapes: name -> shape of every tensor that must be there.
        stem: what the folder is.

    Raises:
        StoreError: missing, unexpected or misshapen tensors, values that are not finite, a
            truncated file or one that is no safetensors.
    """
    file = Path(path) / _tensors(stem)
    with _opened(path, stem) as opened:
        _compare(file, _shapes(opened), shapes, stem)
        tensors = {name: opened.get_tensor(name) for name in shapes}
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise StoreError(
                f"`{file}`: `{name}` holds values that are not finite; the {stem} is damaged"
            )
    return tensors


@contextmanager
def _opened(path: str | Path, stem: str) -> Generator[Any]:
    """The file of tensors, open."""
    from safetensors import SafetensorError, safe_open

    file = Path(path) / _tensors(stem)
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except (SafetensorError, OSError) as error:
        raise StoreError(
            f"`{file}` is truncated or no safetensors file ({error}); pickle files are never read. "
            f"Save or copy the {stem} again"
        ) from None


def _shapes(opened: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118


def _compare(
    file: Path, found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]],
    stem: str,
) -> None:  # fmt: skip
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    wrong = [n for n, shape in expected.items() if n in found and found[n] != tuple(shape)]
    if missing or extra or wrong:
        lines = [f"`{file}` does not hold this {stem}'s tensors:"]
        lines += [f"  missing: {name} {tuple(expected[name])}" for name in missing[:5]]
        lines += [f"  unexpected: {name} {found[name]}" for name in extra[:5]]
        lines += [f"  shape of {n}: {found[n]}, expected {tuple(expected[n])}" for n in wrong[:5]]
        rest = len(missing) + len(extra) + len(wrong) - len(lines) + 1
        lines += [f"  and {rest} more"] if rest > 0 else []
        raise StoreError(
            "\n".join([*lines, f"use the model and spec that the {stem} was saved from"])
        )


def _none_there(folder: Path, stem: str) -> str:
    if not folder.exists():
        return f"there is no folder `{folder}`; give the folder that `{stem}.save` wrote"
    names = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else [folder.name]
    if any(name.endswith((".bin", ".pt", ".pth", ".ckpt", ".pkl")) for name in names):
        return (
            f"`{folder}` holds pickled tensors ({', '.join(names[:4])}), which can run code when "
            "read and are refused; convert them to safetensors with the library that wrote them"
        )
    if "adapter_config.json" in names:
        return f"`{folder}` is a checkpoint of PEFT; `deltune.load_peft` reads it"
    inside = ", ".join(names[:6]) or "nothing"
    return f"`{folder}` holds no {stem} ({_tensors(stem)} and {_about(stem)}), but: {inside}"


def _tensors(stem: str) -> str:
    return f"{stem}.safetensors"


def _about(stem: str) -> str:
    return f"{stem}.json"


def _free(target: Path, overwrite: bool, what: str, about: str) -> None:
    if not target.exists():
        return
    if not overwrite:
        raise StoreError(f"`{target}` exists; choose another folder or pass `overwrite=True`")
    if not (target / about).is_file():
        raise StoreError(f"`{target}` exists and is no {what}; it is not overwritten")


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
