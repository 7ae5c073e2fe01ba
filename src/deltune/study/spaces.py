"""Runs on subspaces: score what they begin at, find one, train a code in it, survey a plane."""

import contextlib
import dataclasses
import itertools
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import deltune as dt
from deltune.errors import StudyError
from deltune.spec import from_json
from deltune.study.joint import DRAWN
from deltune.study.machine import best_device
from deltune.study.measure import OnShare, Rows
from deltune.study.plan import Run
from deltune.study.trial import model_of, settings_of, task_of
from deltune.subspace.landscape import Plane, between, box, survey
from deltune.subspace.learned import Losses, fit
from deltune.subspace.linear import bound, correlated, drawn, principal
from deltune.subspace.settings import FitSettings
from deltune.subspace.solutions import Solutions
from deltune.subspace.space import Subspace
from deltune.subspace.store import load, save
from deltune.subspace.tuning import Called, scores_at, tune
from deltune.tasks.objectives import objective_for
from deltune.tasks.task import Task
from deltune.training.evaluation import in_mode, to_device
from deltune.training.generators import seed_step
from deltune.training.precision import autocast, resolve
from deltune.training.settings import TrainSettings

OWN = ("how", "dimension", "fit", "decoded", "space", "grid", "refine", "points")
"""Settings of these runs that are not of training."""


def start(run: Run, places: dict[str, str], folder: Path, on_share: OnShare) -> Rows:
    """The test metric of each method's delta as it is before any training, on each task: what the
    code zero means in every space."""
    model, tokenizer = model_of(run, places, None)
    found: Rows = []
    targets, settings = run.targets or [], _settings(run)
    for number, target in enumerate(targets):
        on_share(number, len(targets))
        task, objective = _asked(run, places, model, tokenizer, target["task"])
        delta = _begun(run, model, target["spec"])
        value = _tested(model, tokenizer, task, objective, settings)
        found.append({"method": target["method"], "task": target["task"]["name"], "value": value})
        delta.detach()
    return found


def space(run: Run, places: dict[str, str], folder: Path, on_share: OnShare) -> Rows:
    """Finds a space and keeps it; how well it holds the deltas that it is made of and those of the
    unseen tasks: || D - U I || / || D ||, and the test metric of U I."""
    model, tokenizer = model_of(run, places, None)
    with tempfile.TemporaryDirectory(dir=folder) as place:
        starts = _starts(run, model, Path(place))
        seen = _solutions(run, folder, starts, seen=True)
        found = _found(run, places, model, tokenizer, seen, starts, folder, on_share)
        of = {"model": run.model.get("source") or run.model["name"], "head": run.model["head"]}
        found = dataclasses.replace(found, about={**found.about, **of})
        save(found, folder / "spaces" / run.digest(), overwrite=True)
        every = [("seen", seen)]
        if not all(target["seen"] for target in run.targets or ()):
            every.append(("unseen", _solutions(run, folder, starts, seen=False)))
        best = bound(seen, found.dimension)
        rows: Rows = []
        for which, solutions in every:
            errors = found.reconstruction(solutions)
            codes = solutions.rowwise(found.encode)
            lengths = solutions.rowwise(lambda _, differences: differences.norm(dim=1))
            for at, task in enumerate(solutions.tasks):
                own = {name: each[at] for name, each in codes.items()}
                scores = _scores(run, places, found, model, tokenizer, task, own)
                for name, value in scores.items():
                    rows.append(
                        {"method": name, "task": task, "which": which, "value": value,
                         "error": float(errors[name][at]), "bound": float(best[name]),
                         "length": float(lengths[name][at])}
                    )  # fmt: skip
    return rows


def code(run: Run, places: dict[str, str], folder: Path, on_share: OnShare) -> Rows:
    """Trains a code with each step size, takes the best on dev, and tests what every method decodes
    from it."""
    found = load(folder / "spaces" / run.settings["space"])
    model, tokenizer = model_of(run, places, None)
    task, objective = _asked(run, places, model, tokenizer, run.task)
    settings = _settings(run)
    tried = []
    for number, rate in enumerate(run.settings["grid"]):
        on_share(number, len(run.settings["grid"]))
        chosen = dataclasses.replace(settings, learning_rate=rate)
        one = tune(
            found, model, tokenizer, task, run.method, chosen, decoders=(), objective=objective
        )
        assert one.training.best_dev is not None  # `tune` refuses what was not evaluated
        tried.append((one.training.best_dev, -rate, one))
    dev, rate, best = max(tried, key=lambda one: one[:2])  # of equal ones the smaller
    tests = scores_at(
        found, model, tokenizer, task, [best.code], found.methods, settings, objective=objective
    )
    rows: Rows = [{"decoder": name, "value": value} for name, (value,) in tests.items()]
    if refine := run.settings.get("refine"):
        again = _refined(run, found, model, tokenizer, task, best.code, settings_of(refine))
        rows.append({"refined": again})
    return [*rows, {"code": best.code.tolist(), "dev": dev, "learning_rate": -rate}]


def _refined(
    run: Run, found: Subspace, model: Any, tokenizer: Any, task: Task, code: Tensor,
    settings: TrainSettings,
) -> float:  # fmt: skip
    """The test metric of the delta that was trained on from what a code means."""
    delta = found.attach(model, run.method)
    try:
        delta.load_vector(found.decode(run.method, code))
        length, template = settings.max_length, run.task.get("template")
        objective = objective_for(task, model, tokenizer, max_length=length, template=template)
        dt.train(model, tokenizer, task, delta, settings, objective=objective)
        return _tested(model, tokenizer, task, objective, settings)
    finally:
        delta.detach()


def _tested(
    model: Any, tokenizer: Any, task: Task, objective: Any, settings: TrainSettings
) -> float:
    """The test metric of the model as it stands."""
    return dt.evaluate(
        model, tokenizer, task, "test", objective=objective, precision=settings.precision,
        batch_size=settings.per_device_eval_batch_size,
    ).value  # fmt: skip


def landscape(run: Run, places: dict[str, str], folder: Path, on_share: OnShare) -> Rows:
    """What every method scores on a grid around the codes of a task, and on the lines between each
    two of them."""
    found = load(folder / "spaces" / run.settings["space"])
    model, tokenizer = model_of(run, places, None)
    task, objective = _asked(run, places, model, tokenizer, run.task)
    targets, settings = run.targets or [], _settings(run)
    codes = {target["method"]: torch.tensor(target["code"]) for target in targets}
    plane = _plane(list(codes.values()))
    marks = {name: plane.place(one) for name, one in codes.items()}
    land = survey(
        found, model, tokenizer, task, plane, {t["method"]: t["own"] for t in targets}, settings,
        within=box(list(marks.values())), points=run.settings["points"], objective=objective,
        on_point=on_share,
    )  # fmt: skip
    rows: Rows = [{"mark": name, "x": x, "y": y} for name, (x, y) in marks.items()] + land.rows()
    for one, two in itertools.combinations(codes, 2):
        path = between(codes[one], codes[two])
        scores = scores_at(
            found, model, tokenizer, task, path, tuple(codes), settings, objective=objective
        )
        for name, values in scores.items():
            for at, value in enumerate(values):
                share = at / (len(path) - 1)
                rows.append(
                    {"path": f"{one} to {two}", "method": name, "share": share, "value": value}
                )
    return rows


def _starts(run: Run, model: nn.Module, place: Path) -> dict[str, Path]:
    """Each method's delta as every run of its seed has begun with it."""
    specs = {target["method"]: target["spec"] for target in run.targets or ()}
    starts: dict[str, Path] = {}
    for name, spec in {**specs, **run.settings.get("decoded", {})}.items():
        delta = _begun(run, model, spec)
        starts[name] = delta.save(place / str(len(starts)))
        delta.detach()
    return starts


def _begun(run: Run, model: nn.Module, spec: dict[str, Any]) -> dt.Delta:
    """The delta that all runs of a method begin with."""
    torch.manual_seed(run.seed)
    return dt.attach(model, from_json(spec), "delta")


def _solutions(run: Run, folder: Path, starts: Mapping[str, Path], seen: bool) -> Solutions:
    folders: dict[str, dict[str, Path]] = {}
    for target in run.targets or ():
        path = folder / "deltas" / target["final"]
        if not path.exists():
            raise StudyError(
                f"the delta of {target['method']} on {target['task']['name']} is not in `{path}`; "
                f"delete the record runs/{target['final']}.json to train it again"
            )
        if target["seen"] == seen:
            folders.setdefault(target["method"], {})[target["task"]["name"]] = path
    return Solutions.saved(folders, starts)


def _found(
    run: Run, places: dict[str, str], model: Any, tokenizer: Any, seen: Solutions,
    starts: Mapping[str, Path], folder: Path, on_share: OnShare,
) -> Subspace:  # fmt: skip
    how, dimension = run.settings["how"], run.settings["dimension"]
    if how in DRAWN:
        return drawn(seen, dimension, run.seed, DRAWN[how])
    if how != "learned":
        return {"principal": principal, "correlated": correlated}[how](seen, dimension)
    settings = FitSettings(**{**run.settings["fit"], "dimension": dimension})
    tasks = [_asked(run, places, model, tokenizer, _about(run, name)) for name in seen.tasks]
    examples = [objective.encode(task.train) for task, objective in tasks]
    size, precision = _settings(run).per_device_train_batch_size, _settings(run).precision
    device = best_device()
    with contextlib.ExitStack() as stack:
        deltas = {}
        for name, place in starts.items():
            deltas[name] = dt.load(place, model, name=name).disable()
            stack.callback(deltas[name].detach)

        def losses(at: int, step: int) -> Losses:
            draw = torch.Generator().manual_seed(step)
            chosen = torch.randint(len(examples[at]), (size,), generator=draw).tolist()
            objective = tasks[at][1]
            batch = to_device(objective.collate([examples[at][one] for one in chosen]), device)

            def loss(method: str, vector: Tensor) -> Tensor:
                seed_step(run.seed, 0, step, device)
                deltas[method].enable()
                try:
                    with autocast(device, resolve(precision, device)):
                        return objective.loss(Called(deltas[method], lambda: vector), batch)
                finally:
                    deltas[method].disable()

            return loss

        dropout = _settings(run).backbone_dropout
        stack.enter_context(in_mode(model, training=True, dropout=dropout))
        others = {name: deltas[name].vector() for name in run.settings.get("decoded", ())}
        kept = folder / "checkpoints" / run.digest()
        layouts = {name: deltas[name].layout for name in others}
        found = fit(
            seen, settings, losses, lambda step, *_: on_share(step, settings.steps), others, kept,
            layouts, device,
        )  # fmt: skip
        shutil.rmtree(kept, ignore_errors=True)
    return dataclasses.replace(found, deltas=starts)


def _scores(
    run: Run, places: dict[str, str], found: Subspace, model: Any, tokenizer: Any,
    name: str, codes: Mapping[str, Tensor],
) -> dict[str, float]:  # fmt: skip
    """method -> test metric on a task of what it decodes from its own code."""
    task, objective = _asked(run, places, model, tokenizer, _about(run, name))
    return {
        method: scores_at(
            found, model, tokenizer, task, [code], [method], _settings(run), objective=objective
        )[method][0]
        for method, code in codes.items()
    }


def _about(run: Run, name: str) -> dict[str, Any]:
    """The description of a task among the targets."""
    return next(t["task"] for t in run.targets or () if t["task"]["name"] == name)


def _asked(
    run: Run, places: dict[str, str], model: Any, tokenizer: Any, about: dict[str, Any]
) -> tuple[Task, Any]:
    """A task, and how the model is asked for it."""
    task = task_of(run, about, places, run.seed)
    length, template = _settings(run).max_length, about.get("template")
    return task, objective_for(task, model, tokenizer, max_length=length, template=template)


def _plane(codes: list[Tensor]) -> Plane:
    """Through three codes; of two numbers the codes are the plane."""
    if len(codes[0]) == 2:
        return Plane(torch.zeros(2), torch.eye(2))
    if len(codes) < 3:
        raise StudyError(f"a landscape lies on the codes of three methods; there are {len(codes)}")
    return Plane.through(*codes[:3])


def _settings(run: Run) -> TrainSettings:
    return settings_of({n: value for n, value in run.settings.items() if n not in OWN})
