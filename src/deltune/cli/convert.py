"""`deltune convert`: a delta of another method out of a delta."""

import dataclasses
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from deltune.cli import show
from deltune.cli.learn import opened, read_inputs, scored
from deltune.cli.shelf import delta_folder, free_folder, read_result, write_result
from deltune.errors import DataError
from deltune.training.settings import TrainSettings


@dataclass(frozen=True)
class Convert:
    """Make a delta of another method out of a delta, e.g. LoRA for an engine that knows no other.

    Changes of weights are converted by their singular values, others by imitating the source on
    unlabelled texts, or through a subspace. Says how alike the two are on texts that were not
    learned from.
    """

    delta: Positional[Path]
    """Folder of the delta, or the folder that `deltune train` wrote."""
    to: str
    """The method that is wanted, e.g. "lora(rank=8)"."""
    out: Path
    """Folder to write."""
    how: Literal["auto", "weights", "space", "distil"] = "auto"
    """weights, space, distil, or auto: whichever is nearest on the probe."""
    texts: str | None = None
    """Data file with inputs; the training inputs of the task if not given."""
    probe: int | None = None
    """How many of the texts are kept to compare on; a fifth of them, at most 200, if not given."""
    space: Path | None = None
    """Folder of a subspace in which the source's method has the name given by --method."""
    method: str | None = None
    """The source's method in the subspace."""
    model: str | None = None
    """The backbone; that of the training if not given."""
    task: str | None = None
    """The task, whose test split is scored before and after; that of the training if not given."""
    head: str | None = None
    """Head of the model; that of the training if not given."""
    overwrite: bool = False
    """Replace the folder if it exists."""
    json: bool = False
    """Write JSON to standard output."""
    settings: TrainSettings = field(
        default_factory=lambda: TrainSettings(learning_rate=1e-3, num_train_epochs=3)
    )
    """How to imitate; texts are cut to `max_length` tokens, as in the training if it is 128."""

    def run(self) -> None:
        """Converts."""
        import deltune as dt
        from deltune.conversion.convert import convert
        from deltune.subspace.store import load

        spec = dt.parse(self.to)
        shelf = read_result(self.delta).replaced(self.model, self.task, self.head)
        if not self.overwrite:
            free_folder(self.out, overwrite=False, resume=False)
        task, model, tokenizer = opened(shelf.need("task"), shelf.need("model"), shelf.head, 0)
        source = dt.load(delta_folder(self.delta), model, self.method)
        records = read_inputs(self.texts) if self.texts else task.train
        every = [record.input for record in records]
        kept = min(200, -(-len(every) // 5)) if self.probe is None else self.probe
        if not 0 < kept < len(every):
            raise DataError(
                f"--probe is {kept} and there are {len(every)} texts; keep at least one of them, "
                "and leave at least one"
            )
        given = self.settings.max_length
        length = shelf.max_length if given == TrainSettings().max_length else given
        shelf = dataclasses.replace(shelf, max_length=length)
        settings = dataclasses.replace(self.settings, max_length=length)
        first = scored(model, tokenizer, task, "test", settings)
        with show.TrainingBar(quiet=self.json) as bar:
            made = convert(
                source, spec, self.how, tokenizer=tokenizer, texts=every[kept:],
                probe=every[:kept], space=load(self.space) if self.space else None,
                settings=settings, max_length=length, seed=settings.seed, on_event=bar,
            )  # fmt: skip
        test = scored(model, tokenizer, task, "test", settings)
        free_folder(self.out, self.overwrite, resume=False)
        made.delta.save(self.out / "delta")
        data = write_result(
            self.out, str(spec), shelf, settings=settings, trainable=made.delta.count(), test=test,
            result={
                "converted_from": str(source.spec), "how": made.how, "error": made.error,
                "before": made.before and asdict(made.before),
                "after": made.after and asdict(made.after), "source_test": first,
            },
        )  # fmt: skip
        if self.json:
            show.say_json(data)
            return
        show.out().print(_converted(made, task.metric, first, test), markup=False)
        show.out().print(f"saved in {self.out.resolve()}", markup=False)


def _converted(made: Any, metric: str, first: float, test: float) -> str:
    lines = [f"by {made.how}"]
    if made.error is not None:
        lines[0] += f": {made.error:.2%} of the change of weights is left out"
    for name, one in (("the backbone", made.before), ("the converted delta", made.after)):
        decisions = "" if one.same is None else f"{one.same:.1%} of the decisions, "
        lines.append(f"{name} has of the source: {decisions}divergence {one.divergence:.4g}")
    return "\n".join([*lines, f"test {metric} {test:.4f}, of the source {first:.4f}"])
