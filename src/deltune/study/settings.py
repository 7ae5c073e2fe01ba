"""The study file as frozen data: its tables and what they say."""

from dataclasses import dataclass, field
from typing import Any


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
    """As of `load_model`: `classification`, `mean`, `embedding`, `causal`, `seq2seq`, `auto`."""
    dtype: str = "float32"
    """What the backbone is loaded in: `float32` or `bfloat16`."""
    title: str = ""
    """What tables and figures call it, and what tells it from others; `name` if not given."""
    layers: int | None = None
    """Keep only so many layers, the first ones: smaller sizes of one architecture."""
    pretrained: bool = True
    """Whether it has its weights; random ones, drawn by the run's seed, if not."""
    attention: str | None = None
    """What computes its attention, e.g. `eager`."""

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
class Ablations:
    """The `[subspace.ablations]` table: learned spaces of the fewest numbers, each different in one
    thing, in which the unseen tasks are solved too."""

    weight: tuple[float, ...] = ()
    """Of the reconstruction, in the place of that in `fit`."""
    seen: tuple[int, ...] = ()
    """How many of the seen tasks, the first of the file, a space is found from."""
    types: tuple[str, ...] = ()
    """A space is found from the seen tasks of this type alone."""
    shots: tuple[int, ...] = ()
    """A space is found from deltas of so many examples of each class, or in all."""


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
    ablations: Ablations = Ablations()
    """Learned spaces that differ from the others."""


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
