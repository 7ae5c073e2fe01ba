"""From a study file to a plan: tasks read, specs and settings checked, before anything runs."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deltune.errors import DeltuneError, StudyError, SubspaceError, TrainError, closest, listing
from deltune.study.codec import decode
from deltune.study.machine import best_device
from deltune.study.plan import MethodInfo, ModelInfo, Plan, SubspaceInfo, TaskInfo
from deltune.study.reading import combined, place_of, read_study
from deltune.study.settings import MethodEntry, ModelEntry, Study, TaskEntry
from deltune.tasks.encoding import Template
from deltune.tasks.records import Task, load_task
from deltune.training.precision import resolve as resolve_precision
from deltune.training.settings import TrainSettings

OWN = ("learning_rate", "seed")


def plan_study(path: str | Path) -> Plan:
    """The plan of a study file.

    Args:
        path: a `study.toml`.

    Returns:
        The plan: every run of the study follows from it.

    Raises:
        StudyError: the file, a spec, a setting or a task of it cannot be used.
    """
    path = Path(path)
    study = read_study(path)
    places = {
        entry.label: place_of(entry.name, path.parent) for entry in (*study.models, *study.tasks)
    }
    tasks = tuple(_task(entry, places[entry.label], study) for entry in study.tasks)
    entries = [*combined(study.combination), *((one, None) for one in study.methods)]
    plain = {
        entry.name: _method(entry, parts, study, path.name)
        for entry, parts in entries
        if not entry.stages
    }
    methods = tuple(plain.get(e.name) or _staged(e, plain) for e, _ in entries)
    deltas = tuple(m.name for m in methods if m.family != "baseline")
    largest = max(task.train for task in tasks), max(task.dev for task in tasks)
    return Plan(
        name=study.study.name,
        about=study.study.about,
        seeds=study.study.seeds,
        keep_deltas=study.study.keep_deltas,
        models=tuple(_model(entry) for entry in study.models),
        tasks=tasks,
        methods=methods,
        selection={
            "train": study.selection.train or largest[0],
            "dev": study.selection.dev or largest[1],
            "seed": study.selection.seed,
        },
        places=places,
        pilots=study.selection.pilots,
        train_metric=study.study.train_metric,
        transferred=(study.transfer.methods or deltas) if study.transfer else (),
        cost=_cost(study),
        subspace=_subspace(study, methods, tasks, path.name),
    )


def digest_task(task: Task) -> str:
    """SHA-256 over kind, metric, labels and every record of a task, in order."""
    sha = hashlib.sha256()
    head = [task.kind, task.metric, list(task.labels) if task.labels else None]
    sha.update(json.dumps(head).encode())
    for split in ("train", "dev", "test"):
        sha.update(split.encode())
        for record in getattr(task, split):
            sha.update(json.dumps(dataclasses.astuple(record), ensure_ascii=False).encode())
    return sha.hexdigest()


def _model(entry: ModelEntry) -> ModelInfo:
    source = entry.name if entry.title else None
    trained = None if entry.pretrained else False
    return ModelInfo(
        entry.label, entry.head, entry.dtype, entry.layers, trained, source, entry.attention
    )


def _task(entry: TaskEntry, place: str, study: Study) -> TaskInfo:
    task = load_task(place)
    digest, labels = digest_task(task), tuple(task.labels) if task.labels else None
    if entry.template is not None:
        Template.parse(entry.template)
    if entry.shots is not None:
        task = task.few_shot(entry.shots, study.study.seeds[0])
    sizes: dict[str, int] = {}
    for split in ("train", "dev", "test"):
        there = len(getattr(task, split))
        wanted = getattr(entry.budget, split) or getattr(study.budget, split)
        if not there:
            raise StudyError(
                f"task `{entry.label}` has no {split} records; a study needs all three"
            )
        few = entry.shots is not None and split != "test"
        sizes[split] = there if few else min(there, wanted or there)
    return TaskInfo(
        name=entry.label,
        title=entry.title or task.name,
        kind=task.kind,
        metric=task.metric,
        digest=digest,
        labels=labels,
        train=sizes["train"],
        dev=sizes["dev"],
        test=sizes["test"],
        type=entry.type or task.type,
        chance=task.limited(test=sizes["test"]).chance(),
        template=entry.template,
        shots=entry.shots,
        selection={n: v for n, v in dataclasses.asdict(entry.selection).items() if v} or None,
    )


def _method(
    entry: MethodEntry, parts: tuple[str, ...] | None, study: Study, file: str
) -> MethodInfo:
    from deltune.spec import parse
    from deltune.spec import parts as parts_of

    try:
        spec = parse(entry.spec)
    except DeltuneError as error:
        raise StudyError(f"{file}: method `{entry.name}`: {error}") from None
    place = f"{file}: method `{entry.name}`: train settings"
    chosen = {**study.train, **entry.train}
    main = [part for part in parts_of(spec) if part.kind != "head"]
    return MethodInfo(
        name=entry.name,
        text=str(spec),
        spec=json.loads(json.dumps(spec.to_json())),
        learning_rate=entry.learning_rate,
        settings=_settings(chosen, place),
        selection_settings=_settings({**chosen, **study.selection.settings}, place),
        family=main[0].family if len(main) == 1 else spec.family,
        note=entry.note,
        parts=parts,
    )


def _staged(entry: MethodEntry, plain: Mapping[str, MethodInfo]) -> MethodInfo:
    """A sequence of methods; its own settings are those of the first."""
    stages = [plain[name] for name in entry.stages]
    return dataclasses.replace(
        stages[0],
        name=entry.name,
        text=" > ".join(stage.text for stage in stages),
        spec={"kind": "sequence", "stages": [stage.spec for stage in stages]},
        learning_rate=(),
        family="sequence",
        note=entry.note,
        stages=entry.stages,
        parts=None,
    )


def _cost(study: Study) -> dict[str, list[int]] | None:
    if study.cost is None:
        return None
    cost = study.cost
    return {
        "lengths": list(cost.lengths),
        "batch_sizes": list(cost.batch_sizes),
        "rounds": [cost.rounds],
    }


def _subspace(
    study: Study, methods: tuple[MethodInfo, ...], tasks: tuple[TaskInfo, ...], file: str
) -> SubspaceInfo | None:
    from deltune.subspace.settings import FitSettings

    sub = study.subspace
    if sub is None:
        return None
    place = f"{file}: [subspace]"
    if "dimension" in sub.fit:
        raise StudyError(f"{place}: `dimension` does not belong in fit; it stands in `spaces`")
    try:
        fit = decode(FitSettings, sub.fit, f"{place} fit").to_json()
        for weight in sub.ablations.weight:
            FitSettings(weight=weight)
    except SubspaceError as error:
        raise StudyError(f"{place} fit: {error}") from None
    if fit["weight"] in sub.ablations.weight:
        raise StudyError(
            f"{place}: `ablations.weight` names {fit['weight']:g}, which the learned spaces have "
            "already; leave it out"
        )
    types = {task.type for task in tasks if task.name not in sub.unseen}
    if odd := [name for name in sub.ablations.types if name not in types]:
        raise StudyError(
            f"{place}: `ablations.types` names `{odd[0]}`{closest(odd[0], types)}; the seen tasks "
            f"are of {listing(sorted(types))}; `type` of a task says what it is"
        )
    deltas = [m.name for m in methods if m.family not in ("baseline", "sequence")]
    found = SubspaceInfo(
        unseen=sub.unseen,
        methods=sub.methods or tuple(name for name in deltas if name not in sub.decoded),
        spaces=sub.spaces,
        learning_rate=sub.learning_rate,
        settings=_settings({**study.train, **sub.train}, f"{place} train settings"),
        fit={name: value for name, value in fit.items() if name != "dimension"},
        landscapes=sub.landscapes,
        points=sub.points,
        decoded=sub.decoded,
        tune_seen=sub.tune_seen,
        refine=sub.refine,
        ablations=sub.ablations,
    )
    _check_shared(found, place)
    return found


def _check_shared(sub: SubspaceInfo, place: str) -> None:
    """Refuses spaces of no method, and surveys of a plane that codes do not span."""
    if not sub.methods:
        raise StudyError(
            f"{place}: every method is a baseline or a sequence of others, and so none shares the "
            "spaces; name them in `methods`"
        )
    for how, lengths in sub.spaces.items() if sub.landscapes else ():
        codes = len(sub.decoders(how))
        if bad := [length for length in lengths if min(length, 3) > codes or length < 2]:
            raise StudyError(
                f"{place}: `landscapes` of `{how} = {lengths}` with {codes} methods; a plane lies "
                f"on three codes, or two of two numbers, and those of {bad[0]} span none: leave "
                "these out, or give more methods"
            )


def _settings(table: Mapping[str, Any], place: str) -> dict[str, Any]:
    for name in OWN:
        if name in table:
            where = "in the grid of each method" if name == "learning_rate" else "in [study] seeds"
            raise StudyError(f"{place}: `{name}` does not belong here; it stands {where}")
    try:
        settings = TrainSettings.from_json(table)
    except TrainError as error:
        raise StudyError(f"{place}: {error}") from None
    if settings.eval_steps == "no":
        raise StudyError(f'{place}: eval_steps is "no"; a study needs the dev metric of every run')
    # A run's identity says what it computed in, so that another machine's run is another run.
    plain = {"precision": resolve_precision(settings.precision, best_device())}
    return {n: v for n, v in (settings.to_json() | plain).items() if n not in OWN}
