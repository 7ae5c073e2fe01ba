"""The part of `recheck.py` that recomputes what a report says of subspaces."""

import math
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

Check = tuple[str, float, float]
NOTHING = -math.inf
BEGUN = "before training"


class Spaces:
    """The records of the spaces of a study, of the codes in them and of the surveys.

    Args:
        plan: of the study, as in `study.json`.
        records: all that finished.
        floor: task -> what its own delta must be above for a share above chance.
    """

    def __init__(
        self, plan: dict[str, Any], records: Iterable[dict[str, Any]], floor: dict[str, float]
    ) -> None:
        sub = plan.get("subspace") or {}
        self.unseen = sub.get("unseen", [])
        self.methods = [*sub.get("methods", []), *sub.get("decoded", [])]
        self.seeds, self.floor = plan["seeds"], floor
        self.chance = {task["name"]: task["chance"] for task in plan["tasks"]}
        self.titles = {task["title"]: task["name"] for task in plan["tasks"]}
        texts = {method["name"]: method["text"] for method in plan["methods"]}
        self.full = next((name for name, text in texts.items() if text.startswith("full")), None)
        self.spaces: dict[tuple[str, int], dict[str, Any]] = {}
        self.codes: dict[str, list[dict[str, Any]]] = defaultdict(list)
        self.begun: dict[tuple[str, str], float] = {}
        self.surveys: dict[tuple[str, str], dict[str, Any]] = {}
        self.finals: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
        for record in records:
            run = record["run"]
            if run["kind"] == "space":
                key = run["settings"]["how"], run["settings"]["dimension"]
                self.spaces[key] = record
            elif run["kind"] == "start":
                rows = record["measures"]
                self.begun = {(row["task"], row["method"]): row["value"] for row in rows}
            elif run["kind"] == "code":
                self.codes[run["settings"]["space"]].append(record)
            elif run["kind"] == "landscape":
                self.surveys[run["settings"]["space"], run["task"]["name"]] = record
            elif run["kind"] == "final":
                self.finals[run["method"], run["task"]["name"]][run["seed"]] = record["result"][
                    "test"
                ]

    def own(self, method: str, task: str) -> float:
        """The metric of a method's own deltas, mean over seeds."""
        return statistics.fmean(self.finals[method, task].values())

    def first(self, method: str, task: str) -> float:
        """That of the delta that stands for them: the first seed's."""
        return self.finals[method, task][self.seeds[0]]

    def scored(self, how: str, dimension: int, above: bool) -> dict[tuple[str, str, str], float]:
        """(task, source, decoder) -> relative performance, mean over seeds; above chance only
        where the own delta is above the floor."""
        rows = [((task, name, name), value) for (task, name), value in self.begun.items()]
        if how != BEGUN:
            rows = [
                ((record["run"]["task"]["name"], record["run"]["method"], row["decoder"]),
                 row["value"])
                for record in self.codes[self.spaces[how, dimension]["digest"]]
                for row in record["measures"]
                if "decoder" in row
            ]  # fmt: skip
        found: dict[tuple[str, str, str], list[float]] = defaultdict(list)
        for key, value in rows:
            task, _, decoder = key
            if task in self.unseen:
                own, chance = self.own(decoder, task), self.chance[task] if above else 0.0
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
            how, dimension = BEGUN, "0"
            if not detail.startswith(BEGUN):
                how, dimension = detail.removesuffix(": every task").split(" space of ")
            one = self.scored(how, int(dimension), above=of == "Above chance")
            for title, *values in rows:
                for column, value in zip(columns[1:], values, strict=True):
                    source, _, decoder = column.partition(" to ")
                    key = self.titles[title], source, decoder or source
                    at = f"Subspaces, {detail}, {of}, {title}: {column}"
                    yield at, float(value), one.get(key, NOTHING)
        elif part == "Codes and transfer":
            for name, dimension, *values in rows:
                yield from self._summary(_how(name), int(dimension), columns[2:], values)
        elif part.endswith("against dimension"):
            wanted = _same if part.startswith("Codes") else _other
            for how, dimension, value in rows:
                one = self.scored(how, int(float(dimension)), above=True)
                own = round(_mean(one, _same if how == BEGUN else wanted), 4)
                yield f"Subspaces, {part}: {how}, {dimension}", float(value), own
        elif part == "Reconstruction":
            for name, dimension, method, *values in rows:
                yield from self._held(_how(name), int(dimension), method, columns[3:], values)
        elif part == "Seen and unseen tasks":
            yield from self._sets(columns, rows)
        elif columns[:3] == ["decoded as", "x", "y"]:
            yield from self._plane(part, rows)
        elif columns[:2] == ["decoded as", "share"]:
            yield from self._path(part, rows)

    def region(self, title: str, caption: str) -> Check:
        """The share of a plane's points on which all methods reach 90 % of their own deltas."""
        record = self._survey(title)
        own = {target["method"]: target["own"] for target in record["run"]["targets"]}
        reached: dict[tuple[float, float], list[bool]] = defaultdict(list)
        for row in record["measures"]:
            if "method" in row and "x" in row:
                reached[row["x"], row["y"]].append(row["value"] / own[row["method"]] >= 0.9)
        shown = float(re.search(r"(\d+)% of the area", caption)[1])
        own_share = statistics.fmean(all(one) for one in reached.values())
        return f"Subspaces, {title}: area", shown, round(100 * own_share)

    def _digest(self, how: str, dimension: int) -> str:
        return self.spaces[how, dimension]["digest"]

    def _survey(self, title: str) -> dict[str, Any]:
        """The survey of a figure."""
        task, space = title.split(": ")
        how, dimension = space.split(" space of ")
        return self.surveys[self._digest(how, int(dimension)), self.titles[task]]

    def _summary(
        self, how: str, dimension: int, columns: list[str], values: list[str]
    ) -> Iterator[Check]:
        for column, value in zip(columns, values, strict=True):
            above = column.endswith("above chance")
            one = self.scored(how, dimension, above)
            if column in self.methods:
                own = _mean(one, lambda s, d, m=column: s == d == m)
            else:
                own = _mean(one, _other if column.startswith("transfer") else _same)
            yield f"Subspaces, {how}, {dimension}: {column}", float(value), own

    def _held(
        self, how: str, dimension: int, method: str, columns: list[str], values: list[str]
    ) -> Iterator[Check]:
        every = [r for r in self.spaces[how, dimension]["measures"] if r["method"] == method]
        for column, value in zip(columns, values, strict=True):
            kind, _, which = column.partition(", ")
            rows = [row for row in every if not which or row["which"] == which]
            if kind == "kept":
                kept = [
                    (row["value"] - self.chance[row["task"]]) / (own - self.chance[row["task"]])
                    for row in rows
                    if (own := self.first(method, row["task"])) > self.floor[row["task"]]
                ]
                right = statistics.fmean(kept) if kept else NOTHING
            elif rows:
                right = statistics.fmean(row[kind] for row in rows)
            else:
                right = NOTHING
            yield f"Subspaces, {how}, {dimension}, {method}: {column}", float(value), right

    def _plane(self, part: str, rows: list[list[str]]) -> Iterator[Check]:
        record = self._survey(part)
        own = {target["method"]: target["own"] for target in record["run"]["targets"]}
        known = [
            round(row["value"] / own[row["method"]], 4)
            for row in record["measures"]
            if "method" in row and "x" in row
        ]
        for place, ((method, *_, value), right) in enumerate(zip(rows, known, strict=True)):
            yield f"Subspaces, {part}, point {place} decoded as {method}", float(value), right

    def _path(self, part: str, rows: list[list[str]]) -> Iterator[Check]:
        title, _, path = part.rpartition(": ")
        measures = [row for row in self._survey(title)["measures"] if row.get("path") == path]
        for (method, share, value), row in zip(rows, measures, strict=True):
            at = f"Subspaces, {part}, {share} decoded as {method}"
            yield at, float(value), round(row["value"], 4)

    def _sets(self, columns: list[str], rows: list[list[str]]) -> Iterator[Check]:
        """Seen tasks, with their examples or others, and unseen ones."""
        for name, dimension, method, which, *values in rows:
            how = _how(name)
            values_of, refined = self._asked(how, int(dimension), method, which)
            own = {task: list(self.finals[method, task].values()) for task in values_of}
            full = {
                task: list(self.finals[self.full, task].values()) if self.full else []
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
                at = f"Subspaces, {how}, {dimension}, {method}, {which}: {column}"
                yield at, float(value), right[column]

    def _asked(
        self, how: str, dimension: int, method: str, which: str
    ) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
        """task -> metrics of codes of one kind, and of the deltas that they were refined to."""
        found: dict[str, list[float]] = defaultdict(list)
        refined: dict[str, list[float]] = defaultdict(list)
        space = self.spaces[how, dimension]
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


def _how(title: str) -> str:
    """How a space is found, of "how, model"."""
    return title.partition(", ")[0]


def _same(source: str, decoder: str) -> bool:
    return source == decoder


def _other(source: str, decoder: str) -> bool:
    return source != decoder


def _mean(one: dict[tuple[str, str, str], float], of: Callable[[str, str], bool]) -> float:
    values = [value for (_, source, decoder), value in one.items() if of(source, decoder)]
    return statistics.fmean(values) if values else NOTHING
