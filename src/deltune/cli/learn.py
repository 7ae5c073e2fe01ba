"""`deltune train`, `evaluate` and `predict`: work with one delta."""

import json as json_module
import shutil
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tyro.conf import Positional

from deltune.cli import show
from deltune.cli.shelf import Shelf, delta_folder, free_folder, read_result, write_result
from deltune.errors import DataError
from deltune.study import numbers
from deltune.study.machine import best_device
from deltune.training.settings import Precision, TrainSettings


@dataclass(frozen=True)
class Train:
    """Train a delta on a task and save it with its result.

    Writes OUT/delta (the delta), OUT/result.json (settings, curve, scores) and, while it trains,
    OUT/checkpoints.
    """

    spec: Positional[str]
    """The delta, e.g. "lora(rank=8) + bitfit"; also full, head or last(layers=2)."""
    model: str
    """Hub name, folder or pkg:NAME."""
    task: str
    """Task folder, data file, hf:NAME or vader:movie-reviews."""
    out: Path
    """Folder to write."""
    overwrite: bool = False
    """Replace the folder if it exists."""
    resume: bool = False
    """Go on from the folder's last checkpoint."""
    head: str = "auto"
    """Head of the model: classification, mean (the same on an encoder's mean token), choice,
    embedding, causal, seq2seq, or auto: what it is made for."""
    max_train: int | None = None
    """Use at most so many training examples."""
    max_dev: int | None = None
    """Use at most so many dev examples."""
    test: bool = False
    """Also score the test split at the end."""
    json: bool = False
    """Write the result as JSON to standard output."""
    settings: TrainSettings = field(default_factory=TrainSettings)
    """How to train."""

    def run(self) -> None:
        """Trains."""
        import deltune as dt

        spec = dt.parse(self.spec)
        free_folder(self.out, self.overwrite, self.resume)
        task, model, tokenizer = opened(self.task, self.model, self.head, self.settings.seed)
        task = task.limited(train=self.max_train, dev=self.max_dev)
        delta = attached(model, spec, self.settings.seed)
        from deltune.training.loop import train

        checkpoints = self.out / "checkpoints"
        with show.TrainingBar(quiet=self.json) as bar:
            result = train(
                model, tokenizer, task, delta, self.settings, folder=checkpoints, on_event=bar
            )
        delta.save(self.out / "delta", overwrite=self.overwrite or self.resume)
        test = scored(model, tokenizer, task, "test", self.settings) if self.test else None
        data = write_result(
            self.out,
            str(spec),
            Shelf.of(self.model, self.head, task, self.task, self.settings),
            settings=self.settings,
            trainable=delta.count(),
            result=asdict(result),
            test=test,
        )
        shutil.rmtree(checkpoints, ignore_errors=True)
        if self.json:
            show.say_json(data)
            return
        say(self.out, task.metric, data)


@dataclass(frozen=True)
class Evaluate:
    """Score a saved delta on a split of a task."""

    delta: Positional[Path]
    """Folder of the delta, or the folder that `deltune train` wrote."""
    model: str | None = None
    """The backbone; that of the training if not given."""
    task: str | None = None
    """The task; that of the training if not given."""
    split: str = "test"
    """train, dev or test."""
    head: str | None = None
    """Head of the model; that of the training if not given."""
    batch_size: int = 64
    """Examples in one forward pass."""
    precision: Precision = "fp32"
    """fp32, or bf16 for bfloat16 autocast."""
    json: bool = False
    """Write JSON to standard output."""

    def run(self) -> None:
        """Scores."""
        shelf = read_result(self.delta).replaced(self.model, self.task, self.head)
        task, model, tokenizer = opened(shelf.need("task"), shelf.need("model"), shelf.head, 0)
        _load(self.delta, model)
        from deltune.training.loop import evaluate

        found = evaluate(
            model,
            tokenizer,
            task,
            self.split,
            batch_size=self.batch_size,
            precision=self.precision,
            max_length=shelf.max_length,
        )
        if self.json:
            show.say_json(found)
            return
        show.out().print(
            f"{self.split} {found.metric} {found.value:.4f} on {len(found.predictions)} examples "
            f"in {numbers.seconds(found.seconds)}"
        )


@dataclass(frozen=True)
class Predict:
    """Predict with a saved delta: one JSON object per record."""

    delta: Positional[Path]
    """Folder of the delta, or the folder that `deltune train` wrote."""
    input: str
    """Data file with inputs (jsonl, jsonl.gz, csv, parquet), or - for jsonl from standard input."""
    out: Path | None = None
    """File to write; standard output if not given."""
    model: str | None = None
    """The backbone; that of the training if not given."""
    task: str | None = None
    """Task whose kind and labels are meant; those of the training if not given."""
    head: str | None = None
    """Head of the model; that of the training if not given."""
    batch_size: int = 64
    """Examples in one forward pass."""
    precision: Precision = "fp32"
    """fp32, or bf16 for bfloat16 autocast."""

    def run(self) -> None:
        """Predicts."""
        from deltune.tasks.models import load_model
        from deltune.tasks.objectives import objective_for
        from deltune.training.evaluation import predict
        from deltune.training.world import this_world

        shelf = read_result(self.delta).replaced(self.model, self.task, self.head)
        records = read_inputs(self.input)
        task = shelf.empty_task()
        model, tokenizer = load_model(
            shelf.need("model"), shelf.head, labels=task.labels, kind=task.kind
        )
        _load(self.delta, model.to(best_device()))
        objective = objective_for(task, model, tokenizer, max_length=shelf.max_length)
        examples = objective.encode(records)
        found = predict(model, objective, examples, self.batch_size, self.precision, this_world())
        lines = (
            json_module.dumps({"input": record.input, "prediction": text}, ensure_ascii=False)
            for record, text in zip(records, found, strict=True)
        )
        _write(self.out, "".join(line + "\n" for line in lines))


def write_merged(delta: Path, out: Path, shelf: Shelf, overwrite: bool) -> None:
    """Writes the model with a delta merged into its weights."""
    from deltune.tasks.models import load_model

    if not overwrite:
        free_folder(out, overwrite=False, resume=False)
    labels = shelf.labels or None
    model, tokenizer = load_model(shelf.need("model"), shelf.head, labels=labels, kind=shelf.kind)
    _load(delta, model).merge()
    own = {n: t for n, t in model.state_dict().items() if not n.startswith("deltas.")}
    free_folder(out, overwrite, resume=False)
    model.save_pretrained(out, state_dict=own)
    tokenizer.save_pretrained(out)


def opened(task_name: str, model_name: str, head: str, seed: int) -> tuple[Any, Any, Any]:
    """The task, and the model with its tokenizer on the best device."""
    from deltune.tasks.models import load_model
    from deltune.tasks.records import load_task

    task = load_task(task_name)
    model, tokenizer = load_model(model_name, head, labels=task.labels, seed=seed, kind=task.kind)
    return task, model.to(best_device()), tokenizer


def attached(model: Any, spec: Any, seed: int, name: str = "delta") -> Any:
    """A new delta, as the seed draws it."""
    import torch

    import deltune as dt

    torch.manual_seed(seed)
    return dt.attach(model, spec, name)


def _load(folder: Path, model: Any) -> Any:
    import deltune as dt

    return dt.load(delta_folder(folder), model)


def scored(model: Any, tokenizer: Any, task: Any, split: str, settings: TrainSettings) -> float:
    """The metric of the model as it stands on a split."""
    from deltune.training.loop import evaluate

    found = evaluate(
        model,
        tokenizer,
        task,
        split,
        batch_size=settings.per_device_eval_batch_size,
        precision=settings.precision,
        max_length=settings.max_length,
    )
    return found.value


def say(out: Path, metric: str, data: dict[str, Any]) -> None:
    """Tells what a training came to."""
    result = data["result"]
    parts = [f"{data['trainable']:,} parameters trained in {numbers.seconds(result['seconds'])}"]
    if result["best_dev"] is not None:
        parts.append(f"best dev {metric} {result['best_dev']:.4f} at step {result['best_step']}")
    if data["test"] is not None:
        parts.append(f"test {metric} {data['test']:.4f}")
    parts.append(f"saved in {out.resolve()}")
    show.out().print("\n".join(parts), markup=False)


def read_inputs(source: str) -> list[Any]:
    """Records of a data file, or of standard input; they need no target."""
    from deltune.tasks.records import read_records, records_of

    if source != "-":
        return read_records(source, need_target=False)
    rows = []
    for number, line in enumerate(sys.stdin, 1):
        try:
            rows.append(json_module.loads(line))
        except ValueError:
            raise DataError(
                f"line {number} of standard input is not JSON: {line[:80]!r}; write one object "
                'such as {"input": "..."} a line'
            ) from None
        if not isinstance(rows[-1], dict):
            raise DataError(f"line {number} of standard input is not an object: {line[:80]!r}")
    return records_of(rows, "standard input", need_target=False)


def _write(path: Path | None, text: str) -> None:
    if path is None:
        sys.stdout.write(text)
        return
    from deltune.study.records import write_atomic

    write_atomic(path, text)
