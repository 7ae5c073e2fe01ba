"""Runs that train nothing: a delta on other tasks, times of all methods in turn, memory of one."""

import contextlib
import inspect
import statistics
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import deltune as dt
from deltune.errors import DataError, StudyError
from deltune.spec import from_json
from deltune.study.machine import best_device, resident_bytes
from deltune.study.plan import Run
from deltune.study.trial import model_of, settings_of, stage_folder, task_of
from deltune.tasks.objectives import objective_for
from deltune.training.course import Course
from deltune.training.loop import evaluate
from deltune.training.memory import PeakMemory

Rows = list[dict[str, Any]]
OnShare = Callable[[int, int], None]
"""Is told how much is done, and of how much."""
WRITTEN = 8
"""Tokens that a sequence-to-sequence model writes in a cost measurement."""
STEPS = 10**6
"""Length of the training that a cost measurement takes a step of."""


def transfer(run: Run, places: dict[str, str], folder: Path, on_share: OnShare) -> Rows:
    """The test metric of the delta of a final run on each other task, without training; of the
    model as it is on every task, where the run is of no method.

    A target that the model cannot be asked (another label set of a class head, another kind of
    task) has no value but a reason.
    """
    found: Rows = []
    if run.method:
        path = folder / "deltas" / run.settings["final"]
        if not path.exists():
            raise StudyError(
                f"the delta of {run.method} on {run.task['name']} is not in `{path}`; delete the "
                f"record runs/{run.settings['final']}.json to train it again"
            )
        model, tokenizer = model_of(run, places, task_of(run, run.task, places, run.seed))
        for number in range(len(run.stages or ("",))):
            dt.load(stage_folder(path, run, number), model)
    else:
        model, tokenizer = model_of(run, places, None)
    trained = settings_of(run.settings)
    targets = run.targets or ()
    for number, about in enumerate(targets):
        on_share(number, len(targets))
        task = task_of(run, about, places, run.seed)
        row: dict[str, Any] = {"source": run.task["name"], "target": about["name"]}
        try:
            objective = objective_for(
                task, model, tokenizer, max_length=trained.max_length,
                template=about.get("template"),
            )  # fmt: skip
        except DataError as error:
            found.append({**row, "value": None, "reason": str(error)})
            continue
        value = evaluate(
            model, tokenizer, task, "test", batch_size=trained.per_device_eval_batch_size,
            precision=trained.precision, objective=objective,
        ).value  # fmt: skip
        found.append({**row, "value": value, "reason": ""})
    return found


def cost(run: Run, places: dict[str, str], folder: Path, on_share: OnShare) -> Rows:
    """Forward, backward and inference times of one input of each length: medians and quartiles over
    rounds in which every method has its turn."""
    found: Rows = []
    with contextlib.ExitStack() as stack:
        models = {}
        for one in run.targets or ():
            model = _attached(run, places, one["spec"])
            models[one["method"]] = model, stack.enter_context(_course(model))
        lengths, rounds = run.settings["lengths"], run.settings["rounds"]
        for place, length in enumerate(lengths):
            times: dict[tuple[str, str], list[float]] = {}
            for turn in range(-1, rounds):
                on_share(place * (rounds + 1) + turn + 1, len(lengths) * (rounds + 1))
                names = list(models)
                for name in names[turn % len(names) :] + names[: turn % len(names)]:
                    for what, seconds in _timed(*models[name], length).items():
                        times.setdefault((name, what), []).append(seconds)
            for (name, what), every in times.items():
                low, middle, high = _quartiles(every[1:])  # the first is a warm-up
                found.append(
                    {"method": name, "what": what, "length": length, "seconds": middle,
                     "low": low, "high": high}
                )  # fmt: skip
    return found


def memory(run: Run, places: dict[str, str], folder: Path, on_share: OnShare) -> Rows:
    """Peak memory of training steps at each batch size, and memory at rest before them."""
    model = _attached(run, places, run.spec)
    resting = resident_bytes(torch.cuda.is_available())
    found: Rows = []
    sizes = sorted(run.settings["batch_sizes"])
    for number, size in enumerate(sizes):
        on_share(number, len(sizes))
        with _course(model) as course:
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
            peak = PeakMemory(best_device())
            inputs = _inputs(model, size, run.settings["length"])
            for step in range(2):
                course.before_step(step, STEPS)
                _loss(model, inputs).backward()
                course.after_backward()
                optimizer.step()
                course.after_step()
                optimizer.zero_grad()
            row = {"method": run.method, "batch_size": size, "length": run.settings["length"]}
            found.append({**row, "peak_bytes": peak.read(), "resting_bytes": resting})
    return found


def _attached(run: Run, places: dict[str, str], spec: dict[str, Any]) -> Any:
    model, _ = model_of(run, places, None)
    torch.manual_seed(run.seed)
    dt.attach(model, from_json(spec))
    return model.train()


@contextlib.contextmanager
def _course(model: Any) -> Generator[Course]:
    """What the methods ask of training, looking at a made-up input first where they want one."""

    def losses(most: int, size: int | None = None, training: bool = True) -> Iterator[Tensor]:
        yield _loss(model, _inputs(model, 1, 16))

    with Course(model) as course:
        if not course.idle:
            course.prepare(losses)
        yield course


def _inputs(model: Any, size: int, length: int) -> dict[str, Tensor]:
    """Made-up tokens, with labels as the head wants them, if there is one."""
    generator = torch.Generator().manual_seed(length)
    shape, words = (size, length), model.config.get_text_config().vocab_size
    ids = torch.randint(words, shape, generator=generator).to(best_device())
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.can_generate():
        seq2seq = model.config.is_encoder_decoder
        return {**inputs, "labels": ids[:, :WRITTEN] if seq2seq else ids}
    if "labels" not in inspect.signature(model.forward).parameters:
        return inputs
    return {**inputs, "labels": torch.zeros(size, dtype=torch.long, device=ids.device)}


def _loss(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """That of the head; without one the mean square of the states, which is as much to compute."""
    output = model(**inputs)
    return output.loss if "labels" in inputs else output[0].float().square().mean()


def _timed(model: nn.Module, course: Course, length: int) -> dict[str, float]:
    inputs = _inputs(model, 1, length)
    course.before_step(0, STEPS)
    kept: list[Tensor] = []
    found = {
        "forward": _seconds(lambda: kept.append(_loss(model, inputs))),
        "backward": _seconds(lambda: kept.pop().backward()),
    }
    course.after_backward()
    model.zero_grad()
    model.eval()
    with torch.no_grad():
        found["inference"] = _seconds(lambda: model(**inputs))
    model.train()
    return found


def _seconds(work: Callable[[], object]) -> float:
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.synchronize()
    begun = time.perf_counter()
    work()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def _quartiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high
