"""`deltune subspace`: find a space of a study's deltas, tune codes in it, decode them, draw it."""

import dataclasses
import json as json_module
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import Positional, subcommand

from deltune.cli import show
from deltune.cli.fitting import Fit
from deltune.cli.learn import opened
from deltune.cli.shelf import free_folder
from deltune.errors import StudyError, SubspaceError
from deltune.study import numbers
from deltune.training.settings import TrainSettings

SPACE, TUNED = "space", "tuned.json"
FOUND = ("method", "code", "task", "model", "metric", "tests", "settings")
"""What a tuned code has been found to be: the fields of its file that later commands read."""


@dataclass(frozen=True)
class Tune:
    """Train a code of a subspace for a task with one method: as few numbers as the space has.

    Writes OUT/delta (the delta that the method makes of the code), OUT/space (the space) and
    OUT/tuned.json (code, scores), and, while it trains, OUT/checkpoints.
    """

    space: Positional[Path]
    """Folder of the subspace."""
    method: Positional[str]
    """Which of its methods."""
    task: str
    """Task folder, data file, hf:NAME or vader:movie-reviews."""
    out: Path
    """Folder to write."""
    model: str | None = None
    """The backbone; that of the space if not given."""
    max_train: int | None = None
    """Use at most so many training examples."""
    overwrite: bool = False
    """Replace the folder if it exists."""
    resume: bool = False
    """Go on from the folder's last checkpoint."""
    json: bool = False
    """Write JSON to standard output."""
    settings: TrainSettings = field(default_factory=lambda: TrainSettings(learning_rate=5e-2))
    """How to train."""

    def run(self) -> None:
        """Trains the code."""
        from deltune.study.records import write_atomic
        from deltune.subspace.store import load, save
        from deltune.subspace.tuning import tune

        space = load(self.space)
        if not self.overwrite:
            free_folder(self.out, overwrite=False, resume=self.resume)
        elif self.space.resolve().is_relative_to(self.out.resolve()):
            raise SubspaceError(
                f"the space `{self.space}` lies in `{self.out}`, which --overwrite replaces; "
                "choose another --out"
            )
        task, model, tokenizer = opened(self.task, *_backbone(space.about, self.model), 0)
        task = task.limited(train=self.max_train)
        space.attach(model, self.method).detach()  # refused before anything is replaced
        free_folder(self.out, self.overwrite, self.resume)
        checkpoints = self.out / "checkpoints"
        with show.TrainingBar(quiet=self.json) as bar:
            found = tune(
                space, model, tokenizer, task, self.method, self.settings, folder=checkpoints,
                on_event=bar,
            )  # fmt: skip
        delta = space.attach(model, self.method)
        delta.load_vector(space.decode(self.method, found.code))
        delta.save(self.out / "delta", overwrite=True)
        save(space, self.out / SPACE, overwrite=True)
        data = {
            "method": self.method, "code": found.code.tolist(), "task": self.task,
            "model": self.model, "metric": task.metric, "dev": found.training.best_dev,
            "tests": dict(found.tests), "settings": self.settings.to_json(),
        }  # fmt: skip
        write_atomic(self.out / TUNED, json_module.dumps(data, indent=1) + "\n")
        shutil.rmtree(checkpoints, ignore_errors=True)
        if self.json:
            show.say_json(data)
            return
        rows = [
            [name, "trained" if name == self.method else "transferred", numbers.metric(value)]
            for name, value in found.tests.items()
        ]
        show.out().print(show.table(["decoded as", "code", f"test {task.metric}"], rows))
        show.out().print(f"saved in {self.out.resolve()}", markup=False)


@dataclass(frozen=True)
class Transfer:
    """Write the delta that another method makes of a tuned code, without training."""

    tuned: Positional[Path]
    """Folder that `deltune subspace tune` wrote."""
    method: Positional[str]
    """Which method of the space."""
    out: Path
    """Folder of the delta to write."""
    overwrite: bool = False
    """Replace the delta if it exists."""

    def run(self) -> None:
        """Decodes the code."""
        import torch

        from deltune.subspace.store import load
        from deltune.tasks.models import load_model

        data, space = _tuned(self.tuned), load(self.tuned / SPACE)
        name, head = _backbone(space.about, data["model"])
        model, _ = load_model(name, head)
        delta = space.attach(model, self.method)
        delta.load_vector(space.decode(self.method, torch.tensor(data["code"])))
        delta.save(self.out, overwrite=self.overwrite)
        test = numbers.metric(data["tests"].get(self.method))
        show.out().print(
            f"{self.method} from the code of {data['method']}: test {data['metric']} {test}\n"
            f"delta: {self.out.resolve()}",
            markup=False,
        )


@dataclass(frozen=True)
class Landscape:
    """Survey the plane through the codes that three methods found for one task, and draw it.

    Each point is decoded by each method; 100 % is what the method makes of its own code. What is
    found is kept in OUT.part until the picture is there; the same command goes on from it.
    """

    tuned: Positional[tuple[Path, Path, Path]]
    """Three folders that `deltune subspace tune` wrote, of one space and task."""
    out: Path
    """File to write: an SVG picture; the numbers go beside it as JSON."""
    points: int = 15
    """Of the grid, in each direction."""

    def run(self) -> None:
        """Surveys and draws."""
        import torch

        from deltune.study.drawings import document
        from deltune.study.page.landscape import plane_figure
        from deltune.study.records import write_atomic
        from deltune.subspace.landscape import Plane, box, survey
        from deltune.subspace.store import load

        each = self._read()
        space = load(self.tuned[0] / SPACE)
        codes = {one["method"]: torch.tensor(one["code"]) for one in each}
        own = {one["method"]: one["tests"][one["method"]] for one in each}
        plane = Plane.through(*codes.values())
        marks = {name: plane.place(code) for name, code in codes.items()}
        name, head = _backbone(space.about, each[0]["model"])
        task, model, tokenizer = opened(each[0]["task"], name, head, 0)
        settings = TrainSettings.from_json(each[0]["settings"])
        kept, asked = _Kept(self.out.with_name(self.out.name + ".part")), [self.points, each]
        scores = kept.read(asked)
        with show.Counter("evaluations") as bar:

            def on_point(done: int, total: int) -> None:
                kept.write(asked, scores)
                bar(done, total)

            land = survey(
                space, model, tokenizer, task, plane, own, settings,
                within=box(list(marks.values())), points=self.points, on_point=on_point,
                begun=scores,
            )  # fmt: skip
        rows = [{"mark": name, "x": x, "y": y} for name, (x, y) in marks.items()] + land.rows()
        figure = plane_figure(rows, own, task.name)
        write_atomic(self.out, document(figure.picture) + "\n")
        write_atomic(self.out.with_suffix(".json"), json_module.dumps(rows) + "\n")
        kept.path.unlink(missing_ok=True)
        show.out().print(
            f"all three reach 90 % on {land.area():.0%} of the area\nwritten: {self.out.resolve()}",
            markup=False,
        )

    def _read(self) -> list[dict[str, Any]]:
        """The tuned codes, of three methods on one task in one space."""
        from deltune.subspace.store import load

        if self.out.suffix == ".json" or self.out.is_dir():
            raise SubspaceError(
                f"--out {self.out}: expected a file for the picture, with its numbers beside it in "
                "a .json file; give e.g. landscape.svg"
            )
        each = [_tuned(path) for path in self.tuned]
        if len({one["task"] for one in each}) > 1 or len({one["method"] for one in each}) < 3:
            said = ", ".join(f"{one['method']} on {one['task']}" for one in each)
            raise SubspaceError(f"a landscape is of three methods on one task; these are {said}")
        if len({load(path / SPACE).digest() for path in self.tuned}) > 1:
            raise SubspaceError(
                "the codes are of different spaces; a landscape is of one: tune them in the same"
            )
        return each


@dataclass
class _Kept:
    """The scores of a survey that is under way, in a file."""

    path: Path
    last: float = 0.0
    """When it was written."""

    def read(self, asked: list[Any]) -> dict[str, list[float]]:
        """What was found of the same survey; nothing, said on stderr, if the file holds another."""
        try:
            there, scores = json_module.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, TypeError, ValueError):
            there, scores = None, None
        if there == asked and isinstance(scores, dict):
            return scores
        show.err().print(f"{self.path} is not of this survey: begun anew", markup=False)
        return {}

    def write(self, asked: list[Any], scores: dict[str, list[float]], every: float = 5.0) -> None:
        """Keeps what is there by now, if that has not been done for some seconds."""
        from deltune.study.records import write_atomic

        if time.monotonic() - self.last >= every:
            self.last = time.monotonic()
            write_atomic(self.path, json_module.dumps([asked, scores]))


@dataclass(frozen=True)
class Dimension:
    """Print d90 of a study that tries `intrinsic` in several dimensions beside full fine-tuning."""

    study: Positional[Path]
    """The folder of the study."""
    json: bool = False
    """Write JSON to standard output."""

    def run(self) -> None:
        """Prints the table."""
        from deltune.study.page.dimension import crossings
        from deltune.study.plan import read_plan
        from deltune.study.state import State
        from deltune.study.summary import tables

        rows = crossings(tables(State(read_plan(self.study), self.study)))
        if not rows:
            raise StudyError(
                f"`{self.study}` has no `intrinsic` in several dimensions with full fine-tuning "
                "beside it; see docs/studies/dimension.toml"
            )
        if self.json:
            show.say_json([dataclasses.asdict(row) for row in rows])
            return
        lines = [
            [row.task, row.directions, row.said(row.d90), row.said(row.above_chance),
             numbers.metric(row.full)]
            for row in rows
        ]  # fmt: skip
        columns = ["task", "directions", "d90 (between)", "above chance", "full"]
        show.out().print(show.table(columns, lines))


@dataclass(frozen=True)
class Subspaces:
    """One space of few numbers for several methods."""

    verb: (
        Annotated[Fit, subcommand("fit", description="Find a subspace of a study's deltas.")]
        | Annotated[Tune, subcommand("tune", description="Train a code of it for a task.")]
        | Annotated[Transfer, subcommand("transfer", description="Decode it as another method.")]
        | Annotated[Landscape, subcommand("landscape", description="Draw a plane of codes.")]
        | Annotated[Dimension, subcommand("dimension", description="Print d90 of a study.")]
    )

    def run(self) -> None:
        """Runs the verb."""
        self.verb.run()


def _backbone(about: Any, given: str | None) -> tuple[str, str]:
    """The model that a space is of, and its head."""
    name = given or about.get("model")
    if name is None:
        raise SubspaceError("the space does not say which model it is of; give --model")
    return name, about.get("head", "auto")


def _tuned(folder: Path) -> dict[str, Any]:
    try:
        data = json_module.loads((folder / TUNED).read_text(encoding="utf-8"))
        return {name: data[name] for name in (*FOUND, *data)}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SubspaceError(
            f"`{folder}` holds no tuned code ({TUNED}: {error}); give a folder that `deltune "
            "subspace tune` wrote"
        ) from None
