"""`deltune merge` and `deltune diff`: arithmetic on saved deltas, and how alike two of them are."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import Positional

from deltune.cli import show
from deltune.cli.learn import write_merged
from deltune.cli.shelf import delta_folder, free_folder, read_result, write_origin
from deltune.errors import MergeError

if TYPE_CHECKING:
    from deltune.merging.compare import Comparison, Difference


@dataclass(frozen=True)
class Merge:
    """Make one delta of several, without a model; or, of one delta alone, write its model with the
    delta merged into the weights, for any tool that reads models.

    A weighted sum of LoRAs is exact, at the sum of their ranks; --rank gives the nearest of that
    rank and says what it leaves out.
    """

    deltas: Positional[tuple[Path, ...]]
    """Folders of deltas, or folders that `deltune train` wrote."""
    out: Path
    """Folder to write."""
    how: str | None = None
    """linear (the default), slerp, magnitude, ties, dare, dare_ties, breadcrumbs or
    breadcrumbs_ties; regmean or fisher, which measure on training examples; soup, the mean of those
    that score best together on dev, or lorahub, weights with a small loss on training examples."""
    weights: tuple[float, ...] = ()
    """One for each delta; 1 / n each if not given. 1 -1 1 is a - b + c."""
    rank: int | None = None
    """Rank of the merged changes of matrices."""
    density: float | None = None
    """Share of entries that stay, of ways that leave some out."""
    factor: float = 1.0
    """On the result: the lambda of task arithmetic."""
    to: str | None = None
    """The method that holds the merged changes of matrices, e.g. "lora(rank=8)"."""
    keep_head: str | None = None
    """Whose task head goes along where they differ: the number of a delta from 0 on, mean or
    none."""
    start: Path | None = None
    """The delta as it was before training, of methods that have no sum: their tensors are merged as
    differences from it."""
    examples: int = 64
    """Training examples that are looked at."""
    task: str | None = None
    """The task of these examples; that of each training if not given."""
    seed: int = 0
    """Of random choices."""
    force: bool = False
    """Also deltas of different backbones."""
    model: str | None = None
    """The backbone: of one delta that goes into it, that of the training if not given; of several,
    where a change is computed from its weights."""
    head: str | None = None
    """Head of the model; that of the training if not given."""
    overwrite: bool = False
    """Replace the folder if it exists."""
    json: bool = False
    """Write JSON to standard output."""

    def run(self) -> None:
        """Merges."""
        asked = (self.how, self.weights or None, self.rank, self.density, self.to, self.start)
        if len(self.deltas) == 1 and all(one is None for one in asked) and self.factor == 1.0:
            shelf = read_result(self.deltas[0]).replaced(self.model, None, self.head)
            write_merged(self.deltas[0], self.out, shelf, self.overwrite)
            show.out().print(f"merged model: {self.out.resolve()}", markup=False)
            return
        if not self.overwrite:
            free_folder(self.out, overwrite=False, resume=False)
        made, note = self._merged()
        shelf = _shelf(self.deltas, self.keep_head)  # before --overwrite deletes one of them
        free_folder(self.out, self.overwrite, resume=False)
        made.save(self.out / "delta")
        data: dict[str, Any] = {
            "spec": str(made.spec),
            "error": made.error,
            "scalars": made.count(),
        }
        data |= made.origin
        write_origin(self.out, str(made.spec), shelf, {"merged": data})
        if self.json:
            show.say_json(data)
            return
        lines = [f"{one['weight']:g} x {one['spec']}, {one['from']}" for one in data["of"]]
        lines.append(f"merged by {self.how or 'linear'}: {made.spec}, {made.count():,} scalars")
        lines += [note] if note else []
        if made.error:
            lines.append(f"{made.error:.2%} of the merged change is left out")
        show.out().print("\n".join([*lines, f"saved in {self.out.resolve()}"]), markup=False)

    def _merged(self) -> tuple[Any, str]:
        """The merged delta, and what there is to say of it."""
        from deltune.cli.merge_data import MEASURED, TRIED, measured, tried
        from deltune.merging import merge

        how, folders, weights, note = self.how or "linear", self.deltas, self.weights, ""
        given = {"model": self.model, "task": self.task, "head": self.head}
        statistics, head = None, _head(self.keep_head)
        if how in TRIED:
            if weights:
                raise MergeError(f"`{how}` finds the weights; leave --weights out")
            if how == "soup" and head not in (None, "mean"):
                raise MergeError(
                    "the head of a soup is the mean of its members'; leave --keep-head"
                )
            folders, weights, note = tried(how, folders, given, self.examples, self.seed, head)
            how, head = "linear", "mean" if how == "soup" else head
        elif how in MEASURED:
            statistics = measured(how, folders, given, self.examples)
        made = merge(
            [delta_folder(path) for path in folders], how, weights or None, rank=self.rank,
            density=self.density, factor=self.factor, to=self.to, keep_head=head,
            statistics=statistics, model=self._model(), seed=self.seed, force=self.force,
            start=self.start and delta_folder(self.start),
        )  # fmt: skip
        return made, note

    def _model(self) -> Any:
        if self.model is None:
            return None
        from deltune.tasks.models import load_model

        shelf = read_result(self.deltas[0]).replaced(self.model, None, self.head)
        labels = shelf.labels or None
        return load_model(self.model, shelf.head, labels=labels, kind=shelf.kind)[0]


@dataclass(frozen=True)
class Diff:
    """Show how alike two saved deltas are, place by place: the norms of their changes, the angle
    between them, and how much of the leading directions of one lies in those of the other."""

    one: Positional[Path]
    """Folder of a delta, or the folder that `deltune train` wrote."""
    other: Positional[Path]
    """Another."""
    top: int = 8
    """Directions that are compared, at most."""
    start: Path | None = None
    """The delta that both were trained from, of methods that have no sum: their tensors are then
    compared as differences from it."""
    figure: Path | None = None
    """File to write: an SVG picture."""
    force: bool = False
    """Also deltas of different backbones."""
    json: bool = False
    """Write JSON to standard output."""

    def run(self) -> None:
        """Compares."""
        from deltune.merging import diff

        pair, start = map(delta_folder, (self.one, self.other)), self.start
        first = start and delta_folder(start)
        found = diff(*pair, top=self.top, start=first, force=self.force)
        if self.figure is not None:
            from deltune.cli.likeness import picture
            from deltune.study.drawings import document
            from deltune.study.records import write_atomic

            write_atomic(self.figure, document(picture(found)) + "\n")
        if self.json:
            show.say_json(_plain(found))
            return
        columns = ["place", "norm", "norm", "cosine", "angle", "directions", "read", "written"]
        rows = [_row(place) for place in found.places]
        rows.append(["all", *_numbers(found.norms, found.cosine), "", "", ""])
        show.out().print(show.table(columns, rows, right=range(1, 8)))
        lines = [f"one: {found.labels[0]}", f"other: {found.labels[1]}"]
        if self.figure is not None:
            lines.append(f"written: {self.figure.resolve()}")
        show.out().print("\n".join(lines), markup=False)


def _head(said: str | None) -> Any:
    """The choice of a head as `merge` takes it."""
    if said is None or said in ("mean", "none"):
        return said
    if not said.isdecimal():
        raise MergeError(f"--keep-head {said}: expected a number from 0 on, mean or none")
    return int(said)


def _shelf(deltas: tuple[Path, ...], head: str | None) -> Any:
    """What is known of the training of the delta whose task the merged one can do."""
    number = int(head) if head is not None and head.isdecimal() else 0
    return read_result(deltas[number])


def _numbers(norms: tuple[float, float], cosine: float | None) -> list[str]:
    import math

    angle = "–" if cosine is None else f"{math.degrees(math.acos(cosine)):.1f}°"
    said = "–" if cosine is None else f"{cosine:.3f}"
    return [*(f"{norm:.4g}" if norm else "–" for norm in norms), said, angle]


def _row(place: "Difference") -> list[str]:
    row = [place.address, *_numbers(place.norms, place.cosine)]
    if place.inputs is None or place.outputs is None:
        return [*row, "", "", ""]
    i, j = place.inputs.shape
    shares = [f"{float(phi[-1, -1]):.3f}" for phi in (place.inputs, place.outputs)]
    return [*row, f"{i}, {j}", *shares]


def _plain(found: "Comparison") -> dict[str, Any]:
    places = [
        {
            "place": place.address, "role": place.role, "layer": place.layer, "norms": place.norms,
            "cosine": place.cosine,
            "read": None if place.inputs is None else place.inputs.tolist(),
            "written": None if place.outputs is None else place.outputs.tolist(),
        }
        for place in found.places
    ]  # fmt: skip
    return {"of": found.labels, "norms": found.norms, "cosine": found.cosine, "places": places}
