"""Reads a study file strictly, and refuses what cannot be meant."""

import itertools
import os
import tomllib
from dataclasses import asdict
from pathlib import Path
from typing import get_args

from deltune.errors import StudyError, closest, listing
from deltune.study.codec import decode
from deltune.study.settings import Combination, MethodEntry, Study, SubspaceEntry
from deltune.subspace.settings import How

SPACES = get_args(How)
SPANNED = ("principal", "correlated")
"""Spaces that solutions span."""
HEADLESS = ("embedding", "causal", "seq2seq")
"""Heads without parameters of their own for each task."""
NOTHING = "nothing"
"""The empty combination: the head alone."""


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


def combined(
    combination: Combination | None,
) -> list[tuple[MethodEntry, tuple[str, ...] | None]]:
    """The methods of a combination study with the parts that each has: every subset, the empty
    one (the head alone) first, then every order of all parts."""
    if combination is None:
        return []
    parts, found = combination.parts, []
    for size in range(len(parts) + 1):
        for names in itertools.combinations(parts, size):
            name = "+".join(names) or NOTHING
            spec = " + ".join(str(parts[one]) for one in names) or "head"
            rates = tuple(combination.learning_rates.get(name, combination.learning_rate))
            found.append((MethodEntry(name, spec, rates), names))
    orders = itertools.permutations(parts) if combination.orders else ()
    return found + [(MethodEntry(" > ".join(order), stages=order), order) for order in orders]


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
    _check_combination(study.combination, methods, file)
    _check_names(study, file)


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


def _check_combination(combination: Combination | None, methods: list[str], file: str) -> None:
    if combination is None:
        return
    place = f"{file}: [combination]"
    _check_grid(combination.learning_rate, place)
    if not 2 <= len(combination.parts) <= 4:
        raise StudyError(
            f"{place} has {len(combination.parts)} parts; give two to four, e.g. "
            '`{ AP = "adapter", BF = "bitfit" }`'
        )
    for name in combination.parts:
        if name in methods or "+" in name or ">" in name:
            raise StudyError(
                f"{place}: the part `{name}` has the name of a method, or a + or > in it; give it "
                "another"
            )


def _check_names(study: Study, file: str) -> None:
    tasks = [entry.label for entry in study.tasks]
    made = [entry for entry, _ in combined(study.combination)] + list(study.methods)
    methods = [entry.name for entry in made]
    single = [entry.name for entry in made if not entry.stages]
    wanted = [("selection.pilots", name, tasks) for name in study.selection.pilots]
    if study.transfer:
        wanted += [("transfer.methods", name, methods) for name in study.transfer.methods]
    if study.subspace:
        _check_subspace(study.subspace, study, file)
        sub = study.subspace
        wanted += [("subspace.unseen", name, tasks) for name in sub.unseen]
        wanted += [("subspace.methods", name, single) for name in sub.methods]
        wanted += [("subspace.decoded", name, single) for name in sub.decoded]
        wanted += [("subspace.landscapes", name, list(sub.unseen)) for name in sub.landscapes]
    for place, name, known in wanted:
        if name not in known:
            raise StudyError(
                f"{file}: `{place}` names `{name}`{closest(name, known)}; expected one of "
                f"{listing(known, 8)}"
            )


def _check_subspace(sub: SubspaceEntry, study: Study, file: str) -> None:
    place = f"{file}: [subspace]"
    _check_grid(sub.learning_rate, place)
    seen = [entry.label for entry in study.tasks if entry.label not in sub.unseen]
    if not sub.unseen or not sub.spaces or not seen:
        raise StudyError(
            f"{place} has {len(sub.unseen)} unseen tasks, {len(seen)} others to find a space from "
            f"and {len(sub.spaces)} spaces; give at least one of each"
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
                f"{place}: `{how} = {lengths}` with {len(seen)} tasks to find a space from "
                f"({listing(seen, 3)}); solutions span at most as many numbers as there are tasks: "
                "give fewer, or use `learned`, `random` or `fastfood`"
            )
    for field in ("unseen", "methods", "decoded", "landscapes"):
        names = getattr(sub, field)
        if len(set(names)) != len(names):
            raise StudyError(f"{place}: `{field} = {list(names)}` has a name twice")
    if sub.decoded and "learned" not in sub.spaces:
        raise StudyError(
            f"{place}: only `learned` spaces know {listing(sub.decoded)} of `decoded`; add one"
        )
    if both := [name for name in sub.decoded if name in sub.methods]:
        raise StudyError(
            f"{place}: {listing(both)} stands in `methods` and in `decoded`; name it in one"
        )
    _check_ablations(sub, len(seen), place)
    if sub.points < 2:
        raise StudyError(f"{place} has points = {sub.points}; a survey has 2 or more a side")
    headed = [entry.label for entry in study.models if entry.head not in HEADLESS]
    if headed:
        raise StudyError(
            f"{place}: the model `{headed[0]}` has a head for each task, which is in the deltas, "
            f"so that they have no space in common; set `head` to one of {listing(HEADLESS)}"
        )


def _check_ablations(sub: SubspaceEntry, seen: int, place: str) -> None:
    for name, values in asdict(sub.ablations).items():
        if values and "learned" not in sub.spaces:
            raise StudyError(
                f"{place}: `ablations.{name}` is of `learned` spaces and there are none; add one"
            )
        if len(set(values)) != len(values):
            raise StudyError(f"{place}: `ablations.{name} = {list(values)}` has a value twice")
    if bad := [count for count in sub.ablations.seen if not 1 <= count < seen]:
        raise StudyError(
            f"{place}: `ablations.seen` names {bad[0]}; give 1 to {seen - 1}, fewer than the "
            f"{seen} tasks that all learned spaces are found from"
        )
    if few := [count for count in sub.ablations.shots if count < 1]:
        raise StudyError(f"{place}: `ablations.shots` names {few[0]}; give 1 or more")
