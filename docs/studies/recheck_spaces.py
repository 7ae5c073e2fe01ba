"""The part of `recheck.py` that recomputes what a report says of subspaces."""

import math
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from recheck_likeness import Likeness

Check = tuple[str, float, float]
NOTHING = -math.inf
BEGUN = "before training"
ABOVE = "Above chance"
MEAN = "Mean over tasks"
Space = tuple[str, str, int]
"""Model, how it is found (in brackets what is not as in the others), length of its codes."""


class Spaces:
    """The records of the spaces of a study, of the codes in them and of the surveys.

    Args:
        plan: of the study, as in `study.json`.
        records: all that finished.
        floor: task -> what its own delta must be above for a share above chance.
    """

    def __init__(
        self, plan: dict[str, Any], records: Iterable[dict[str, Any]], floor: dict[str, float],
        tested: dict[str, float],
    ) -> None:  # fmt: skip
        sub = plan.get("subspace") or {}
        self.unseen = sub.get("unseen", [])
        self.methods = [*sub.get("methods", []), *sub.get("decoded", [])]
        self.pairs = {name: (name, name) for name in self.methods}
        self.pairs |= {f"{s} to {d}": (s, d) for s in self.methods for d in self.methods if s != d}
        self.seeds, self.floor, self.tested = plan["seeds"], floor, tested
        self.chance = {task["name"]: task["chance"] for task in plan["tasks"]}
        self.titles = {task["title"]: task["name"] for task in plan["tasks"]}
        self.types = {task["name"]: task["type"] for task in plan["tasks"]}
        texts = {method["name"]: method["text"] for method in plan["methods"]}
        self.full = next((name for name, text in texts.items() if text.startswith("full")), None)
        self.spaces: dict[Space, dict[str, Any]] = {}
        self.codes: dict[str, list[dict[str, Any]]] = defaultdict(list)
        self.begun: dict[str, list[dict[str, Any]]] = {}
        self.surveys: dict[tuple[str, str], dict[str, Any]] = {}
        self.finals: dict[tuple[str, str, str], dict[int, float]] = defaultdict(dict)
        for record in records:
            run = record["run"]
            model, task = run["model"]["name"], run["task"]["name"]
            if run["kind"] == "space":
                self.spaces[model, _how(run, plan), run["settings"]["dimension"]] = record
            elif run["kind"] == "start":
                self.begun[model] = record["measures"]
            elif run["kind"] == "code":
                self.codes[run["settings"]["space"]].append(record)
            elif run["kind"] == "landscape":
                self.surveys[run["settings"]["space"], task] = record
            elif run["kind"] == "final":
                self.finals[model, run["method"], task][run["seed"]] = record["result"]["test"]
        self._name([model["name"] for model in plan["models"]])

    def _name(self, models: list[str]) -> None:
        """What the report calls each thing: names of models and tasks may hold what it puts
        between them, so that they cannot be read out of a title."""
        of = {model: f", {model}" if len(models) > 1 else "" for model in models}
        self.rows: dict[tuple[str, int], Space] = {}
        self.folds: dict[str, Space] = {}
        self.figures: dict[str, tuple[str, bool]] = {}
        self.maps: dict[str, Space] = {}
        self.planes: dict[str, dict[str, Any]] = {}
        self.paths: dict[str, tuple[dict[str, Any], str]] = {}
        for model in models:
            self.rows[f"{BEGUN}, {model}", 0] = (model, BEGUN, 0)
            self.folds[f"{BEGUN}, {model}: every task"] = (model, BEGUN, 0)
            self.figures[f"Codes against dimension{of[model]}"] = (model, True)
            self.figures[f"Transfer against dimension{of[model]}"] = (model, False)
        for space, record in self.spaces.items():
            model, how, dimension = space
            name = f"{how} space of {dimension}{of[model]}"
            self.rows[f"{how}, {model}", dimension] = space
            self.folds[f"{name}: every task"] = space
            self.maps[f"Cosine of codes: {name}"] = space
            for title, task in self.titles.items():
                if survey := self.surveys.get((record["digest"], task)):
                    self.planes[f"{title}: {name}"] = survey
                    for path in {row["path"] for row in survey["measures"] if "path" in row}:
                        self.paths[f"{title}: {name}: {path}"] = survey, path

    def own(self, model: str, method: str, task: str) -> float:
        """The metric of a method's own deltas, mean over seeds."""
        return statistics.fmean(self.finals[model, method, task].values())

    def scored(
        self, space: Space, above: bool, seed: int | None = None
    ) -> dict[tuple[str, str, str], float]:
        """(task, source, decoder) -> relative performance, mean over seeds or of one; above chance
        only where the own delta is above the floor."""
        model, how, _ = space
        if how == BEGUN:
            rows = [
                ((row["task"], row["method"], row["method"]), row["value"])
                for row in self.begun[model]
            ]
        else:
            rows = [
                ((record["run"]["task"]["name"], record["run"]["method"], row["decoder"]),
                 row["value"])
                for record in self.codes[self.spaces[space]["digest"]]
                if seed is None or record["run"]["seed"] == seed
                for row in record["measures"]
                if "decoder" in row
            ]  # fmt: skip
        found: dict[tuple[str, str, str], list[float]] = defaultdict(list)
        for key, value in rows:
            task, _, decoder = key
            if task in self.unseen:
                own, chance = self.own(model, decoder, task), self.chance[task] if above else 0.0
                if own > (self.floor[task] if above else 0.0):
                    found[key].append((value - chance) / (own - chance))
        return {key: statistics.fmean(values) for key, values in found.items()}

    def checks(
        self, part: str, detail: str, of: str, columns: list[str], rows: list[list[str]]
    ) -> Iterator[Check]:
        """(what, the report's value, the records' value) of one table of the section.

        Args:
            part: the heading above it.
            detail: what the fold is called that it lies in.
            of: the lowest heading above it.
            columns: its names.
            rows: its sortable values.
        """
        if detail.endswith(": every task"):
            one = self.scored(self.folds[detail], above=of == ABOVE)
            for title, *values in rows:
                for column, value in zip(columns[1:], values, strict=True):
                    right = self._cell(one, title, *self.pairs[column])
                    yield f"Subspaces, {detail}, {of}, {title}: {column}", float(value), right
        elif part == "Codes and transfer":
            for name, dimension, *values in rows:
                yield from self._summary(name, int(dimension), columns[2:], values)
        elif part == "Transfer by direction":
            for name, dimension, source, *values in rows:
                one = self.scored(self.rows[name, int(dimension)], above=of == ABOVE)
                for column, value in zip(columns[3:], values, strict=True):
                    right = self._cell(one, MEAN, source, column.removeprefix("as "))
                    at = f"Subspaces, {part}, {of}, {name}, {dimension}: {source} {column}"
                    yield at, float(value), right
        elif " against dimension" in part:
            yield from self._curves(part, rows)
        elif part == "Reconstruction":
            for name, dimension, method, *values in rows:
                yield from self._held(name, int(dimension), method, columns[3:], values)
        elif part == "Seen and unseen tasks":
            yield from self._sets(columns, rows)
        elif part == "Likeness of codes":
            yield from self._likeness(columns, rows)
        elif columns == ["task", "other task", "cosine"]:
            alike = self._alike(self.maps[part])
            for one, other, shown in rows:
                right = alike.of(self.titles[one], self.titles[other])
                at = f"Subspaces, {part}, {one} and {other}"
                yield at, float(shown or NOTHING), right if right == NOTHING else round(right, 4)
        elif columns[:3] == ["decoded as", "x", "y"]:
            yield from self._plane(part, rows)
        elif columns[:2] == ["decoded as", "share"]:
            yield from self._path(part, rows)

    def region(self, title: str, caption: str) -> Check:
        """The share of a plane's points on which all methods reach 90 % of their own deltas."""
        record = self.planes[title]
        own = {target["method"]: target["own"] for target in record["run"]["targets"]}
        reached: dict[tuple[float, float], list[bool]] = defaultdict(list)
        for row in record["measures"]:
            if "method" in row and "x" in row:
                reached[row["x"], row["y"]].append(row["value"] / own[row["method"]] >= 0.9)
        shown = float(re.search(r"(\d+)% of the area", caption)[1])
        own_share = statistics.fmean(all(one) for one in reached.values())
        return f"Subspaces, {title}: area", shown, round(100 * own_share)

    def _curves(self, part: str, rows: list[list[str]]) -> Iterator[Check]:
        """Codes, or transfer, against their length; and by how much the seeds differ."""
        model, tuned = self.figures[part]
        for how, dimension, value, *spread in rows:
            begun = how == BEGUN  # a level, drawn from the shortest codes to the longest
            space = (model, how, 0 if begun else int(float(dimension)))
            wanted = _same if begun or tuned else _other
            own = round(_mean(self.scored(space, above=True), wanted), 4)
            at = f"Subspaces, {part}: {how}, {dimension}"
            yield at, float(value), own
            for shown in spread:
                right = NOTHING if begun else self._deviation(space, wanted)
                yield f"{at}, deviation", float(shown) if shown else NOTHING, right

    def _deviation(self, space: Space, wanted: Callable[[str, str], bool]) -> float:
        """Over the seeds that have the codes of all tasks, of their means."""
        every = [self.scored(space, True, seed) for seed in self.seeds]
        every = [{k: v for k, v in one.items() if wanted(*k[1:])} for one in every]
        most = max(map(len, every))
        means = [statistics.fmean(one.values()) for one in every if one and len(one) == most]
        return round(statistics.stdev(means), 4) if len(means) > 1 else NOTHING

    def _cell(
        self, one: dict[tuple[str, str, str], float], title: str, source: str, decoder: str
    ) -> float:
        """A task's relative performance in one direction, or the mean of all."""
        if title == MEAN:
            return _mean(one, lambda s, d: (s, d) == (source, decoder))
        return one.get((self.titles[title], source, decoder), NOTHING)

    def _summary(
        self, name: str, dimension: int, columns: list[str], values: list[str]
    ) -> Iterator[Check]:
        for column, value in zip(columns, values, strict=True):
            above = column.endswith("above chance")
            one = self.scored(self.rows[name, dimension], above)
            if column in self.methods:
                own = _mean(one, lambda s, d, m=column: s == d == m)
            else:
                own = _mean(one, _other if column.startswith("transfer") else _same)
            yield f"Subspaces, {name}, {dimension}: {column}", float(value), own

    def _held(
        self, name: str, dimension: int, method: str, columns: list[str], values: list[str]
    ) -> Iterator[Check]:
        record = self.spaces[self.rows[name, dimension]]
        every = [r for r in record["measures"] if r["method"] == method]
        targets = [one for one in record["run"]["targets"] if one["method"] == method]
        own = {one["task"]["name"]: self.tested[one["final"]] for one in targets}
        for column, value in zip(columns, values, strict=True):
            kind, _, which = column.partition(", ")
            rows = [row for row in every if not which or row["which"] == which]
            if kind == "kept":
                kept = [
                    (row["value"] - self.chance[task]) / (own[task] - self.chance[task])
                    for row in rows
                    if own[task := row["task"]] > self.floor[task]
                ]
                right = statistics.fmean(kept) if kept else NOTHING
            elif rows:
                right = statistics.fmean(row[kind] for row in rows)
            else:
                right = NOTHING
            yield f"Subspaces, {name}, {dimension}, {method}: {column}", float(value), right

    def _alike(self, space: Space) -> Likeness:
        return Likeness(self.codes[self.spaces[space]["digest"]], self.types)

    def _likeness(self, columns: list[str], rows: list[list[str]]) -> Iterator[Check]:
        """The mean cosines of codes."""
        for name, dimension, *values in rows:
            means = self._alike(self.rows[name, int(dimension)]).means()
            for column, value in zip(columns[2:], values, strict=True):
                at = f"Subspaces, Likeness of codes, {name}, {dimension}: {column}"
                yield at, float(value), means[column]

    def _plane(self, part: str, rows: list[list[str]]) -> Iterator[Check]:
        record = self.planes[part]
        own = {target["method"]: target["own"] for target in record["run"]["targets"]}
        known = [
            round(row["value"] / own[row["method"]], 4)
            for row in record["measures"]
            if "method" in row and "x" in row
        ]
        for place, ((method, *_, value), right) in enumerate(zip(rows, known, strict=True)):
            yield f"Subspaces, {part}, point {place} decoded as {method}", float(value), right

    def _path(self, part: str, rows: list[list[str]]) -> Iterator[Check]:
        survey, path = self.paths[part]
        measures = [row for row in survey["measures"] if row.get("path") == path]
        for (method, share, value), row in zip(rows, measures, strict=True):
            at = f"Subspaces, {part}, {share} decoded as {method}"
            yield at, float(value), round(row["value"], 4)

    def _sets(self, columns: list[str], rows: list[list[str]]) -> Iterator[Check]:
        """Seen tasks, with their examples or others, and unseen ones."""
        for name, dimension, method, which, *values in rows:
            space = self.rows[name, int(dimension)]
            values_of, refined = self._asked(space, method, which)
            own = {t: list(self.finals[space[0], method, t].values()) for t in values_of}
            full = {
                task: list(self.finals[space[0], self.full, task].values()) if self.full else []
                for task in values_of
            }
            right = {
                "of the own delta": _over(values_of, own),
                "of full fine-tuning": _over(values_of, full),
                "deviation": _spread(values_of),
                "of the own delta's": _spread(own),
                "refined": _over(refined, own),
                "its deviation": _spread(refined),
            }
            for column, value in zip(columns[4:], values, strict=True):
                at = f"Subspaces, {name}, {dimension}, {method}, {which}: {column}"
                yield at, float(value), right[column]

    def _asked(
        self, key: Space, method: str, which: str
    ) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
        """task -> metrics of codes of one kind, and of the deltas that they were refined to."""
        found: dict[str, list[float]] = defaultdict(list)
        refined: dict[str, list[float]] = defaultdict(list)
        space = self.spaces[key]
        if which.endswith("decoded"):
            for row in space["measures"]:
                if row["method"] == method and which.startswith(f"{row['which']},"):
                    found[row["task"]].append(row["value"])
            return found, refined
        for record in self.codes[space["digest"]]:
            run = record["run"]
            task = run["task"]["name"]
            other = bool(run["task"].get("shots")) and run["seed"] != self.seeds[0]
            kind = "unseen" if task in self.unseen else "seen" + ", other examples" * other
            if run["method"] != method or which != f"{kind}, trained":
                continue
            for row in record["measures"]:
                if row.get("decoder") == method:
                    found[task].append(row["value"])
                if "refined" in row:
                    refined[task].append(row["refined"])
        return found, refined


def _over(values: dict[str, list[float]], references: dict[str, list[float]]) -> float:
    kept = [
        statistics.fmean(some) / own
        for task, some in values.items()
        if references[task] and (own := statistics.fmean(references[task]))
    ]
    return statistics.fmean(kept) if kept else NOTHING


def _spread(values: dict[str, list[float]]) -> float:
    kept = [statistics.stdev(some) for some in values.values() if len(some) > 1]
    return statistics.fmean(kept) if kept else NOTHING


def _how(run: dict[str, Any], plan: dict[str, Any]) -> str:
    """How a space is found, with what of it is not as in the plan's others."""
    how, weight = run["settings"]["how"], run["settings"].get("fit", {}).get("weight")
    seen = {target["task"]["name"] for target in run["targets"] if target["seen"]}
    if weight is not None and weight != plan["subspace"]["fit"]["weight"]:
        how += f" (weight {weight:g})"
    if len(seen) < len(plan["tasks"]) - len(plan["subspace"]["unseen"]):
        types = {task["type"] for task in plan["tasks"] if task["name"] in seen}
        typed = len(types) == 1 and "(types" in run["method"]
        how += f" (types {types.pop()})" if typed else f" (seen {len(seen)})"
    shots = {task["name"]: task.get("shots") for task in plan["tasks"]}
    of = [target["task"] for target in run["targets"] if target["seen"]]
    if few := {task.get("shots") for task in of if task.get("shots") != shots[task["name"]]}:
        how += f" (shots {few.pop()})"
    return how


def _same(source: str, decoder: str) -> bool:
    return source == decoder


def _other(source: str, decoder: str) -> bool:
    return source != decoder


def _mean(one: dict[tuple[str, str, str], float], of: Callable[[str, str], bool]) -> float:
    values = [value for (_, source, decoder), value in one.items() if of(source, decoder)]
    return statistics.fmean(values) if values else NOTHING
