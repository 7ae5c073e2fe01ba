"""The study file: what to run, as frozen data read strictly from TOML."""

import os
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from deltune.errors import StudyError, closest, listing
from deltune.study.codec import decode
from deltune.subspace.settings import How

SPACES = get_args(How)
SPANNED = ("principal", "correlated")
"""Spaces that solutions span."""
HEADLESS = ("embedding", "causal", "seq2seq")
"""Heads without parameters of their own for each task."""


@dataclass(frozen=True, slots=True)
class Header:
    """The `[study]` table."""

    name: str
    """Title of the study and of its report."""
    seeds: tuple[int, ...] = (0, 1)
    """One run of every method per seed, which draws delta, head and order of examples."""
    about: str = ""
    """A sentence or two for the reader of the report."""
    train_metric: bool = False
    """Also evaluate on the training examples at the end, for the generalisation gap."""
    keep_deltas: bool = False
    """Keep the delta of every final run in `deltas/`; otherwise it is measured and deleted."""


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """One `[[models]]` table."""

    name: str
    """Hub name, folder (environment variables are filled in) or `pkg:NAME`."""
    head: str = "auto"
    """`classification`, `embedding`, `causal`, `seq2seq`, or `auto`: what the architecture is made
    for."""
    dtype: str = "float32"
    """What the backbone is loaded in: `float32` or `bfloat16`."""
    title: str = ""
    """What tables and figures call it, and what tells it from others; `name` if not given."""
    layers: int | None = None
    """Keep only so many layers, the first ones: smaller sizes of one architecture."""
    pretrained: bool = True
    """Whether it has its weights; random ones, drawn by the run's seed, if not."""

    @property
    def label(self) -> str:
        """What it is called."""
        return self.title or self.name


@dataclass(frozen=True, slots=True)
class Budget:
    """The `[budget]` table: how many examples each run may see; the same ones for every run. A task
    may have its own."""

    train: int | None = None
    """Training examples; all of them if not given."""
    dev: int | None = None
    """Dev examples, which choose the step and the learning rate."""
    test: int | None = None
    """Test examples, read once at the end of each final run."""


@dataclass(frozen=True, slots=True)
class TaskEntry:
    """One `[[tasks]]` table."""

    name: str
    """Folder or file (environment variables are filled in), or what else `load_task` takes."""
    title: str = ""
    """What tables and figures call it, and what tells it from others; `name` if not given."""
    type: str = ""
    """What it is about, e.g. `sentiment`; told by its name or metadata if not given."""
    template: str | None = None
    """Texts around input and target, as in `"{input} It was {target}"`."""
    shots: int | None = None
    """Few-shot: so many training and dev examples of each label, drawn by the run's seed."""
    budget: Budget = Budget()
    """What replaces the study's `[budget]` for this task, e.g. `{ train = 2560 }`."""
    selection: Budget = Budget()
    """Training and dev examples of this task's selection runs, instead of `[selection]`'s."""

    @property
    def label(self) -> str:
        """What it is called."""
        return self.title or self.name


@dataclass(frozen=True, slots=True)
class MethodEntry:
    """One `[[methods]]` table."""

    name: str
    """What the tables and figures call it."""
    spec: str = ""
    """The delta as text, e.g. `lora(rank=8)`."""
    learning_rate: tuple[float, ...] = ()
    """A small grid, from which the dev split chooses; one value is taken as it is."""
    stages: tuple[str, ...] = ()
    """Instead of a spec: other methods, trained one after another, each with its own learning rate
    and settings; the earlier deltas stay, frozen."""
    note: str = ""
    """Why these settings; shown in the report."""
    train: dict[str, Any] = field(default_factory=dict)
    """Train settings that replace those of `[train]` for this method."""


@dataclass(frozen=True, slots=True)
class Selection:
    """The `[selection]` table: the cheaper runs that choose a learning rate on dev."""

    train: int | None = None
    """Training examples of a selection run, out of the budget's; the budget's own if not given."""
    dev: int | None = None
    """Dev examples of a selection run; the budget's own if not given."""
    seed: int = 0
    """The one seed that selection uses."""
    pilots: tuple[str, ...] = ()
    """Tasks that choose for all: a method's rate is the one with the best mean dev metric over the
    pilots of the same kind of task (over all where none is). Every task chooses for itself if not
    given."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Train settings that replace those of the final runs, e.g. `{ epochs = 1 }`."""


@dataclass(frozen=True, slots=True)
class Combination:
    """The `[combination]` table: every subset of some methods at once, and in every order."""

    parts: dict[str, str]
    """Names of methods with their specs, e.g. `{ AP = "adapter", BF = "bitfit" }`."""
    learning_rate: tuple[float, ...]
    """The grid of every subset."""
    learning_rates: dict[str, Any] = field(default_factory=dict)
    """Grids of single subsets that replace it, by their names, e.g. `{ "AP+BF" = [1e-3] }`."""
    orders: bool = False
    """Also train all parts one after another, in every order."""


@dataclass(frozen=True, slots=True)
class Transfer:
    """The `[transfer]` table: each trained delta on every other task, without training."""

    methods: tuple[str, ...] = ()
    """Methods whose deltas are tried; all that are not baselines if not given."""


@dataclass(frozen=True, slots=True)
class Cost:
    """The `[cost]` table: times against input length and peak memory against batch size."""

    lengths: tuple[int, ...] = (16, 32, 64, 128, 256)
    """Input lengths in tokens, at batch size 1."""
    batch_sizes: tuple[int, ...] = (1, 8, 32)
    """Batch sizes of the memory measurement, at the longest of the lengths."""
    rounds: int = 9
    """Interleaved rounds of each time; their median counts."""


@dataclass(frozen=True, slots=True)
class SubspaceEntry:
    """The `[subspace]` table: spaces of the solutions of some tasks, in which others are solved."""

    unseen: tuple[str, ...]
    """Tasks that are solved by training a code; the deltas of all others make the spaces."""
    learning_rate: tuple[float, ...]
    """The grid of the codes; dev chooses in each run."""
    spaces: dict[str, Any]
    """How they are found, with the lengths of the codes, a space each: `principal`, `correlated`,
    `learned`, `random` or `fastfood`, e.g. `{ principal = [4, 20], random = [20] }`."""
    methods: tuple[str, ...] = ()
    """Methods that share the spaces; all that are not baselines if not given."""
    train: dict[str, Any] = field(default_factory=dict)
    """Train settings of the codes that replace those of `[train]`."""
    fit: dict[str, Any] = field(default_factory=dict)
    """How `learned` spaces are found: `steps`, `learning_rate`, `weight`, ..."""
    landscapes: tuple[str, ...] = ()
    """Unseen tasks whose plane of codes is surveyed."""
    points: int = 15
    """Of a survey, in each direction."""
    decoded: tuple[str, ...] = ()
    """Methods without solutions in the spaces: learned ones teach them to decode, as `full`."""
    tune_seen: bool = False
    """Whether codes are trained on the tasks that the spaces are made of, too."""
    refine: bool = False
    """Whether each delta is trained on, as on its own, from what the trained code means."""


@dataclass(frozen=True, slots=True)
class Study:
    """A study as its file states it: models x methods x tasks x seeds under one budget."""

    study: Header
    models: tuple[ModelEntry, ...]
    tasks: tuple[TaskEntry, ...]
    methods: tuple[MethodEntry, ...] = ()
    budget: Budget = Budget()
    selection: Selection = Selection()
    train: dict[str, Any] = field(default_factory=dict)
    combination: Combination | None = None
    transfer: Transfer | None = None
    cost: Cost | None = None
    subspace: SubspaceEntry | None = None


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
    methods = [entry.name for entry in study.methods]
    for kind, names in (
        ("models", [entry.label for entry in study.models]),
        ("tasks", [entry.label for entry in study.tasks]),
        ("methods", methods),
        ("study.seeds", list(map(str, study.study.seeds))),
    ):
        if not names and not (kind == "methods" and study.combination):
            raise StudyError(f"{file}: `{kind}` is empty; a study needs at least one")
        doubled = sorted({name for name in names if names.count(name) > 1})
        if doubled:
            raise StudyError(
                f"{file}: `{kind}` has `{doubled[0]}` twice; give each another name or `title`"
            )
    plain = [entry.name for entry in study.methods if not entry.stages]
    plain += list(study.combination.parts) if study.combination else []
    for method in study.methods:
        _check_method(method, plain, file)
    _check_sizes(study, file)
    _check_names(study, methods, file)


def _check_method(method: MethodEntry, methods: list[str], file: str) -> None:
    place = f"{file}: method `{method.name}`"
    if bool(method.spec) == bool(method.stages):
        raise StudyError(f"{place} has neither or both of `spec` and `stages`; give one of them")
    if method.stages:
        unknown = [name for name in method.stages if name not in methods or name == method.name]
        if unknown or method.learning_rate or method.train or len(method.stages) < 2:
            raise StudyError(
                f"{place} has the stages {listing(method.stages)}; expected two or more other "
                f"methods of the file ({listing(methods)}), whose own rates and settings count"
            )
        return
    _check_grid(method.learning_rate, place)


def _check_grid(grid: tuple[float, ...], place: str) -> None:
    if not grid or min(grid) <= 0:
        raise StudyError(f"{place} has learning_rate = {list(grid)}; give one or more above 0")
    if len(set(grid)) != len(grid):
        raise StudyError(f"{place} has a learning rate twice")


def _check_sizes(study: Study, file: str) -> None:
    sizes = [(name, getattr(study.selection, name)) for name in ("train", "dev")]
    for budget in (
        study.budget,
        *(b for task in study.tasks for b in (task.budget, task.selection)),
    ):
        sizes += [(name, getattr(budget, name)) for name in ("train", "dev", "test")]
    sizes += [("layers", entry.layers) for entry in study.models]
    sizes += [("shots", entry.shots) for entry in study.tasks]
    if study.cost:
        sizes += [("rounds", study.cost.rounds)]
        sizes += [("lengths", one) for one in study.cost.lengths or (0,)]
        sizes += [("batch_sizes", one) for one in study.cost.batch_sizes or (0,)]
    for name, size in sizes:
        if size is not None and size < 1:
            raise StudyError(f"{file}: `{name} = {size}`; give 1 or more")
    for task in study.tasks:
        if task.selection.test is not None:
            raise StudyError(
                f"{file}: task `{task.label}` has `selection.test = {task.selection.test}`; "
                "selection never reads the test split: set `budget.test`"
            )


def _check_names(study: Study, methods: list[str], file: str) -> None:
    tasks = [entry.label for entry in study.tasks]
    wanted = [("selection.pilots", name, tasks) for name in study.selection.pilots]
    if study.transfer:
        wanted += [("transfer.methods", name, methods) for name in study.transfer.methods]
    if study.subspace:
        _check_subspace(study.subspace, study, file)
        sub = study.subspace
        wanted += [("subspace.unseen", name, tasks) for name in sub.unseen]
        wanted += [("subspace.methods", name, methods) for name in sub.methods]
        wanted += [("subspace.decoded", name, methods) for name in sub.decoded]
        wanted += [("subspace.landscapes", name, list(sub.unseen)) for name in sub.landscapes]
    for place, name, known in wanted:
        if name not in known:
            raise StudyError(
                f"{file}: `{place}` names `{name}`{closest(name, known)}; expected one of "
                f"{listing(known, 8)}"
            )
    if study.combination is None:
        return
    place = f"{file}: [combination]"
    _check_grid(study.combination.learning_rate, place)
    if not 2 <= len(study.combination.parts) <= 4:
        raise StudyError(
            f"{place} has {len(study.combination.parts)} parts; give two to four, e.g. "
            '`{ AP = "adapter", BF = "bitfit" }`'
        )
    for name in study.combination.parts:
        if name in methods or "+" in name or ">" in name:
            raise StudyError(
                f"{place}: the part `{name}` has the name of a method, or a + or > in it; give it "
                "another"
            )


def _check_subspace(sub: SubspaceEntry, study: Study, file: str) -> None:
    place = f"{file}: [subspace]"
    _check_grid(sub.learning_rate, place)
    seen = [entry.label for entry in study.tasks if entry.label not in sub.unseen]
    if not sub.unseen or not sub.spaces or len(seen) < 2:
        raise StudyError(
            f"{place} has {len(sub.unseen)} unseen tasks, {len(seen)} others and "
            f"{len(sub.spaces)} spaces; give at least one of each, and two tasks to find a space "
            "from"
        )
    for how, lengths in sub.spaces.items():
        if how not in SPACES:
            raise StudyError(
                f"{place}: `spaces` names `{how}`{closest(how, SPACES)}; expected {listing(SPACES)}"
            )
        good = isinstance(lengths, list) and lengths and len(set(lengths)) == len(lengths)
        if not good or not all(type(one) is int and one > 0 for one in lengths):
            raise StudyError(
                f"{place}: `{how} = {lengths}`; give the lengths of its codes, e.g. [4, 20]"
            )
        if how in SPANNED and max(lengths) > len(seen):
            raise StudyError(
                f"{place}: `{how} = {lengths}` with {len(seen)} tasks to find a space from; such a "
                "space has at most as many numbers as tasks"
            )
    if sub.decoded and "learned" not in sub.spaces:
        raise StudyError(
            f"{place}: only `learned` spaces know {listing(sub.decoded)} of `decoded`; add one"
        )
    if both := [name for name in sub.decoded if name in sub.methods]:
        raise StudyError(
            f"{place}: {listing(both)} stands in `methods` and in `decoded`; name it in one"
        )
    if sub.points < 2:
        raise StudyError(f"{place} has points = {sub.points}; a survey has 2 or more a side")
    headed = [entry.label for entry in study.models if entry.head not in HEADLESS]
    if headed:
        raise StudyError(
            f"{place}: the model `{headed[0]}` has a head for each task, which is in the deltas, "
            f"so that they have no space in common; set `head` to one of {listing(HEADLESS)}"
        )
