"""The study file: what to run, as frozen data read strictly from TOML."""

import os
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deltune.errors import StudyError
from deltune.study.codec import decode


@dataclass(frozen=True, slots=True)
class Header:
    """The `[study]` table."""

    name: str
    """Title of the study and of its report."""
    seeds: tuple[int, ...] = (0, 1)
    """One run of every method per seed, which draws delta, head and order of examples."""
    about: str = ""
    """A sentence or two for the reader of the report."""
    keep_deltas: bool = False
    """Keep the delta of every final run in `deltas/`; otherwise it is measured and deleted."""


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """One `[[models]]` table."""

    name: str
    """Hub name, folder (environment variables are filled in) or `pkg:NAME`."""
    head: str = "auto"
    """`classification`, `causal`, `seq2seq`, or `auto`: what the architecture is made for."""
    dtype: str = "float32"
    """What the backbone is loaded in: `float32` or `bfloat16`."""


@dataclass(frozen=True, slots=True)
class TaskEntry:
    """One `[[tasks]]` table."""

    name: str
    """Folder or file (environment variables are filled in), `hf:NAME`, or `vader:movie-reviews`."""


@dataclass(frozen=True, slots=True)
class MethodEntry:
    """One `[[methods]]` table."""

    name: str
    """What the tables and figures call it."""
    spec: str
    """The delta as text, e.g. `lora(rank=8)`."""
    learning_rate: tuple[float, ...]
    """A small grid, from which the dev split chooses; one value is taken as it is."""
    note: str = ""
    """Why these settings; shown in the report."""
    train: dict[str, Any] = field(default_factory=dict)
    """Train settings that replace those of `[train]` for this method."""


@dataclass(frozen=True, slots=True)
class Budget:
    """The `[budget]` table: how many examples each run may see; the same ones for every run."""

    train: int | None = None
    """Training examples; all of them if not given."""
    dev: int | None = None
    """Dev examples, which choose the step and the learning rate."""
    test: int | None = None
    """Test examples, read once at the end of each final run."""


@dataclass(frozen=True, slots=True)
class Selection:
    """The `[selection]` table: the cheaper runs that choose a learning rate on dev."""

    train: int | None = None
    """Training examples of a selection run, out of the budget's; the budget's own if not given."""
    dev: int | None = None
    """Dev examples of a selection run; the budget's own if not given."""
    seed: int = 0
    """The one seed that selection uses."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Train settings that replace those of the final runs, e.g. `{ epochs = 1 }`."""


@dataclass(frozen=True, slots=True)
class Study:
    """A study as its file states it: models x methods x tasks x seeds under one budget."""

    study: Header
    models: tuple[ModelEntry, ...]
    tasks: tuple[TaskEntry, ...]
    methods: tuple[MethodEntry, ...]
    budget: Budget = Budget()
    selection: Selection = Selection()
    train: dict[str, Any] = field(default_factory=dict)


def read_study(path: str | Path) -> Study:
    """The study of a TOML file.

    Args:
        path: the file.

    Returns:
        The study as written; paths in it are not yet resolved.

    Raises:
        StudyError: no such file, not TOML, an unknown or missing field, an empty or doubled list.
    """
    path = Path(path)
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StudyError(
            f"cannot read the study `{path}`: {error.strerror}; give the path of a study.toml"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise StudyError(f"`{path}` is not TOML: {error}") from None
    study = decode(Study, table, f"{path.name}:")
    _check(study, path.name)
    return study


def place_of(name: str, base: Path) -> str:
    """Where a model or task lies: variables filled in, and relative to the study's own folder.

    Raises:
        StudyError: an environment variable that is not set.
    """
    filled = os.path.expanduser(os.path.expandvars(name))
    if "$" in filled:
        raise StudyError(
            f"`{name}`: an environment variable in it is not set; set it or write a path"
        )
    beside = base / filled
    return str(beside.resolve()) if beside.exists() else filled


def _check(study: Study, file: str) -> None:
    for kind, names in (
        ("models", [entry.name for entry in study.models]),
        ("tasks", [entry.name for entry in study.tasks]),
        ("methods", [entry.name for entry in study.methods]),
        ("study.seeds", list(map(str, study.study.seeds))),
    ):
        if not names:
            raise StudyError(f"{file}: `{kind}` is empty; a study needs at least one")
        doubled = sorted({name for name in names if names.count(name) > 1})
        if doubled:
            raise StudyError(f"{file}: `{kind}` has `{doubled[0]}` twice; give each another name")
    for method in study.methods:
        if not method.learning_rate or min(method.learning_rate) <= 0:
            raise StudyError(
                f"{file}: method `{method.name}` has learning_rate = {list(method.learning_rate)}; "
                "give one or more values above 0"
            )
        if len(set(method.learning_rate)) != len(method.learning_rate):
            raise StudyError(f"{file}: method `{method.name}` has a learning rate twice")
    for owner in (study.budget, study.selection):
        for name in ("train", "dev", "test"):
            size = getattr(owner, name, None)
            if size is not None and size < 1:
                raise StudyError(f"{file}: `{name} = {size}` examples; give 1 or more")
