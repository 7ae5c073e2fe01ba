"""The part of `recheck.py` that recomputes what a report says of intrinsic dimension."""

import math
import statistics
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

Check = tuple[str, float, float]
NOTHING = -math.inf


class Dimensions:
    """Metrics against dimension, by model and task."""

    def __init__(
        self, plan: dict[str, Any], records: list[dict[str, Any]], floor: dict[str, float]
    ) -> None:
        self.floor, tasks = floor, plan["tasks"]
        self.chance = {task["name"]: task["chance"] for task in tasks}
        self.named = {
            f"{task['title']}, {model['name']}": (task["name"], model["name"])
            for task in tasks
            for model in plan["models"]
        }
        specs = {method["name"]: method["spec"] for method in plan["methods"]}
        first: dict[tuple[str, int], str] = {}
        for name, spec in specs.items():
            first.setdefault((_directions(spec), _main(spec).get("dimension", 0)), name)
        names = {name: key for key, name in first.items()}
        scores: dict[tuple[str, str, str, int], list[float]] = defaultdict(list)
        for record in records:
            run = record["run"]
            if run["kind"] == "final" and run["method"] in names:
                at = run["model"]["name"], run["task"]["name"], *names[run["method"]]
                scores[at].append(record["result"]["test"])
        self.scores = {key: statistics.fmean(values) for key, values in scores.items()}

    def checks(self, part: str, columns: list[str], rows: list[list[str]]) -> Iterator[Check]:
        """(what, the report's value, the records' value) of one table of the section."""
        for row in rows:
            title, directions = (part, row[0]) if part else row[:2]
            task, model = self.named[title]
            curve = {
                d: score
                for (m, t, kind, d), score in self.scores.items()
                if (m, t, kind) == (model, task, directions)
            }
            if part:
                yield f"{part}, {directions}, {row[1]}", float(row[2]), round(curve[int(row[1])], 4)
                continue
            full = self.scores[model, task, "full", 0]
            head = self.scores.get((model, task, "head", 0), NOTHING)
            wanted = 0.1 * self.chance[task] + 0.9 * full
            right = {
                "d90 (between)": _crossing(curve, head, 0.9 * full),
                "above chance": _crossing(curve, head, wanted)
                if full > self.floor[task]
                else NOTHING,
                "full fine-tuning": full,
                "head only": head,
                "best of them": max(curve.values()),
            }
            for column, value in zip(columns[2:], row[2:], strict=True):
                shown = NOTHING if value == "–" else float(value)
                yield f"{title}, {directions}: {column}", shown, right[column]


def _main(spec: dict[str, Any]) -> dict[str, Any]:
    """What there is beside a head."""
    kept = [part for part in spec.get("parts", []) if part["kind"] != "head"]
    return kept[0] if len(kept) == 1 else spec


def _directions(spec: dict[str, Any]) -> str:
    """What the report calls the directions of a method; its kind if it has none."""
    spec = _main(spec)
    if spec["kind"] != "intrinsic":
        return spec["kind"]
    scope = ", global" if spec.get("scope") == "global" else ""
    where = f", {spec['where']}" if spec["where"] else ""
    return f"{spec['variant'].upper()}, {spec['projection']}{scope}{where}"


def _crossing(curve: dict[int, float], head: float, wanted: float) -> float:
    """The dimension at which a curve, drawn over the logarithm, first comes to a height; 0 where
    the head alone is there."""
    if head >= wanted:
        return 0
    at = sorted(curve)
    place = next((place for place, d in enumerate(at) if curve[d] >= wanted), None)
    if place is None:
        return at[-1] + 1
    if place == 0:
        return at[0]
    low, high = at[place - 1], at[place]
    share = (wanted - curve[low]) / (curve[high] - curve[low])
    return low * (high / low) ** share
