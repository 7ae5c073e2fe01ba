"""Recomputes every average of a study's report from its records, by other code.

    python docs/studies/recheck.py FOLDER

reads the records (`runs/*.json`), the types and chances of the tasks (`study.json`) and the tables
of `report.html`, needs nothing but Python, and ends with an error where a number of the report is
not what the records give.
"""

import json
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

from recheck_dimension import Dimensions
from recheck_landscape import contours, landscapes
from recheck_spaces import Spaces

CLOSE = 5e-9


class Shown(NamedTuple):
    """A table of a page."""

    section: str
    part: str
    """The heading above it: of its figure, if it is the data of one."""
    fold: str
    """What is clicked on to see it."""
    under: str
    """The lowest heading above it."""
    columns: list[str]
    rows: list[list[str]]
    """Sortable values."""


class Page(HTMLParser):
    """The tables of a page, and the captions of its figures by their titles."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: list[Shown] = []
        self.captions: dict[str, str] = {}
        self.heads = {"h2": "", "h3": "", "summary": "", "h4": "", "figcaption": ""}
        self.above: dict[str, str] = {}
        self.open = ""
        self.column = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self.heads:
            below = list(self.heads)[list(self.heads).index(tag) :]
            self.heads.update({name: "" for name in below if tag in ("h2", "h3") or name == tag})
            self.open = tag
        elif tag == "figure":
            self.above = dict(self.heads)
        elif tag == "table":
            h = self.heads
            self.tables.append(Shown(h["h2"], h["h3"], h["summary"], h["h4"], [], []))
        elif tag == "tr" and self.tables:
            self.tables[-1].rows.append([])
        elif tag in ("td", "th") and self.tables:
            value = dict(attrs).get("data-v")
            self.column = value is None
            if value is None:
                self.tables[-1].columns.append("")
            else:
                self.tables[-1].rows[-1].append(value)

    def handle_endtag(self, tag: str) -> None:
        if tag == self.open:
            self.open = ""
        if tag == "figcaption":
            self.captions[self.heads["h3"]] = self.heads["figcaption"]
        if tag == "figure":
            self.heads = self.above
        if tag in ("td", "th"):
            self.column = False

    def handle_data(self, data: str) -> None:
        if self.open:
            self.heads[self.open] += data
        elif self.column:
            self.tables[-1].columns[-1] += data


class Records:
    """The final records of each model, by method and task, and what was tried on other tasks."""

    def __init__(self, folder: Path) -> None:
        plan = json.loads((folder / "study.json").read_text())
        self.types = {task["name"]: task["type"] for task in plan["tasks"]}
        self.chance = {task["name"]: task["chance"] for task in plan["tasks"]}
        self.floor = {task["name"]: floor(task) for task in plan["tasks"]}
        self.titles = {task["title"]: task["name"] for task in plan["tasks"]}
        texts = {method["name"]: method["text"] for method in plan["methods"]}
        self.methods = list(texts)
        self.full = next((name for name, text in texts.items() if text.startswith("full")), None)
        self.found: dict[str, dict[tuple[str, str], list[dict[str, Any]]]] = {}
        self.tried: dict[tuple[str, str, str, str], float | None] = {}
        self.own: dict[tuple[str, str, str], float] = {}
        self.added: dict[tuple[str, str, int], int] = {}
        seed = plan["seeds"][0]
        every = [json.loads(path.read_text()) for path in sorted((folder / "runs").glob("*.json"))]
        every = [record for record in every if record["status"] == "finished"]
        shots = {task["name"]: task.get("shots") for task in plan["tasks"]}
        finals = [record for record in every if record["run"]["kind"] == "final"]
        tested = {record["digest"]: record["result"]["test"] for record in finals}
        every = [record for record in every if not _short(record["run"], shots)]
        self.spaces = Spaces(plan, every, self.floor, tested)
        self.dimensions = Dimensions(plan, every, self.floor)
        for record in every:
            run = record["run"]
            model, method, task = run["model"]["name"], run["method"], run["task"]["name"]
            if run["kind"] == "transfer":
                for row in record["measures"]:
                    self.tried[model, method, row["source"], row["target"]] = row["value"]
            if run["kind"] == "memory":
                for row in record["measures"]:
                    added = max(0, row["peak_bytes"] - row["resting_bytes"])
                    self.added[model, method, row["batch_size"]] = added
            if run["kind"] != "final":
                continue
            own = self.found.setdefault(model, defaultdict(list))
            own[method, task].append(record["result"])
            if run["seed"] == seed:
                self.own[model, method, task] = record["result"]["test"]

    def tasks(self, model: str) -> list[str]:
        """The tasks that every method has finished."""
        own = self.found[model]
        return [t for t in self.types if all(own.get((m, t)) for m in self.methods)]

    def test(self, model: str, method: str, task: str) -> float:
        return statistics.fmean(one["test"] for one in self.found[model][method, task])

    def settled(self, model: str, method: str, task: str) -> float:
        """The same, equal where the scores of several seeds have one sum."""
        return round(self.test(model, method, task), 12)


def floor(task: dict[str, Any]) -> float:
    """Chance and two standard errors: of a share, or of a correlation."""
    chance, count = task["chance"], max(1, task["test"])
    if task["metric"] in ("matthews", "pearson", "spearman"):
        return chance + 2 / math.sqrt(count)
    return chance + 2 * math.sqrt(chance * (1 - chance) / count)


def performance(records: Records, model: str) -> dict[str, dict[str, float]]:
    """Each method's mean, relative performance, rank and wins, and its convergence."""
    tasks, found = records.tasks(model), {}
    full = records.full
    scores = {t: {m: records.test(model, m, t) for m in records.methods} for t in tasks}
    settled = {t: {m: records.settled(model, m, t) for m in records.methods} for t in tasks}
    for method in records.methods:
        own = found[method] = {"mean": statistics.fmean(scores[t][method] for t in tasks)}
        ranks = []
        for one in settled.values():
            above = sum(value > one[method] for value in one.values())
            same = sum(value == one[method] for value in one.values())
            ranks.append(above + (same + 1) / 2)
        own["rank"] = statistics.fmean(ranks)
        if full:
            pairs = [(s[method], s[full], t) for t, s in scores.items()]
            own["of full"] = statistics.fmean(a / b for a, b, _ in pairs if b > 0)
            above = [
                (a - records.chance[t]) / (b - records.chance[t])
                for a, b, t in pairs
                if b > records.floor[t]
            ]
            own["of full above chance"] = statistics.fmean(above) if above else -math.inf
            if method != full:
                equal = [(s[method], s[full]) for s in settled.values()]
                own["wins"] = statistics.fmean((a > b) + (a == b) / 2 for a, b in equal)
        results = [r for t in tasks for r in records.found[model][method, t]]
        firsts = [first(r["curve"]) for r in results]
        shares = [step / r["steps"] for (step, _), r in zip(firsts, results, strict=True)]
        own["steps to 90 % of its best"] = statistics.fmean(shares)
        own["seconds to it"] = statistics.fmean(second for _, second in firsts)
        own["area under the curve"] = statistics.fmean(area(r["curve"]) for r in results)
        gaps = [
            statistics.fmean(abs(r["train"] - r["test"]) for r in records.found[model][method, t])
            for t in tasks
            if records.found[model][method, t][0]["train"] is not None
        ]
        if gaps:
            own["|train − test|"] = statistics.fmean(gaps)
    return found


def first(curve: list[list[float]]) -> tuple[float, float]:
    best = max(point[2] for point in curve)
    wanted = 0.9 * best if best > 0 else best
    step, seconds, _ = min((p for p in curve if p[2] >= wanted), key=lambda p: p[0])
    return step, seconds


def area(curve: list[list[float]]) -> float:
    if len(curve) == 1:
        return curve[0][2]
    total = sum(
        (curve[i + 1][0] - curve[i][0]) * (curve[i + 1][2] + curve[i][2]) / 2
        for i in range(len(curve) - 1)
    )
    return total / (curve[-1][0] - curve[0][0])


def sections(model: str, several: bool) -> list[str]:
    """The headings under which the averages of a model stand."""
    return [f"{name} of {model}" if several else name for name in ("Performance", "Convergence")]


def checks(folder: Path) -> Iterator[tuple[str, float, float]]:
    """(what, the report's value, the records' value)."""
    records, page = Records(folder), Page()
    text = (folder / "report.html").read_text()
    page.feed(text)
    several = len(records.found) > 1
    for table in page.tables:
        section, part, columns = table.section, table.part, table.columns
        rows = [row for row in table.rows if row]
        model = next((m for m in records.found if section in sections(m, several)), None)
        if model is not None and part == "By type of task":
            for kind, count, *values in rows:
                tasks = [t for t in records.tasks(model) if records.types[t] == kind]
                yield f"{section}, {kind}: tasks", float(count), len(tasks)
                for method, value in zip(columns[2:], values, strict=True):
                    own = statistics.fmean(records.test(model, method, t) for t in tasks)
                    yield f"{section}, {kind}, {method}", float(value), own
        elif model is not None and part == "Every task":
            for title, _, _, chance, *values in rows:
                task = records.titles[title]
                yield f"{section}, {title}: chance", float(chance), records.chance[task]
                for method, value in zip(columns[4:], values, strict=True):
                    yield (
                        f"{section}, {title}, {method}",
                        float(value),
                        records.test(model, method, task),
                    )
        elif model is not None and "Critical" not in part:
            known = performance(records, model)
            for name, *values in rows:
                for column, value in zip(columns[1:], values, strict=True):
                    if name in known and column in known[name]:
                        yield f"{section}, {name}: {column}", float(value), known[name][column]
        elif section == "Scale" and columns[1] != "parameters":
            yield from _scale(records, columns, rows)
        elif section == "Cost" and columns[1].removeprefix("batch ").isdigit():
            yield from _memory(records, part, columns, rows)
        elif section == "Transfer":
            yield from _transfer(records, part, rows)
        elif section == "Subspaces":
            yield from records.spaces.checks(part, table.fold, table.under, columns, rows)
        elif section == "Intrinsic dimension":
            yield from records.dimensions.checks(part, columns, rows)
        elif section == "Combination" and columns[0] == "method":
            if "seed" not in columns:  # curves are the records themselves
                yield from _drawn(records, part, rows)
        elif section == "Combination":
            yield from _combination(records, part, columns, rows, several)
    for title, caption in page.captions.items():
        if caption.startswith("All methods reach"):
            yield records.spaces.region(title, caption)
    for title, picture in landscapes(text):
        yield from contours(title, picture, records.spaces.planes[title])


def _scale(
    records: Records, columns: list[str], rows: list[list[str]]
) -> Iterator[tuple[str, float, float]]:
    """Means over tasks and shares of steps, a column for each model."""
    steps = ": steps to 90 %"
    for column, *values in zip(columns[1:], *(row[1:] for row in rows), strict=True):
        model = column.removesuffix(steps) if column.endswith(steps) else column.rsplit(" (", 1)[0]
        known = performance(records, model)
        key = "steps to 90 % of its best" if column.endswith(steps) else "mean"
        for (method, *_), value in zip(rows, values, strict=True):
            yield f"Scale, {method}: {column}", float(value), known[method][key]


def _transfer(
    records: Records, part: str, rows: list[list[str]]
) -> Iterator[tuple[str, float, float]]:
    """Metrics above chance over those of the target's own delta, to four digits; where there is
    no number, there can be none."""
    method, model = part.rsplit(" with ", 1)
    for source, target, shown in rows:
        bare = source == "the model as it is"
        value = records.tried[(model, "", "", target) if bare else (model, method, source, target)]
        chance, own = records.chance[target], records.own[model, method, target]
        known = value is not None and own > records.floor[target]
        right = round((value - chance) / (own - chance), 4) if known else float("inf")
        at = f"Transfer, {part}: {source} on {target}"
        yield at, float(shown) if shown else float("inf"), right


def _memory(
    records: Records, model: str, columns: list[str], rows: list[list[str]]
) -> Iterator[tuple[str, float, float]]:
    """Bytes that training adds, and the share that is saved of another method's."""
    for method, *values in rows:
        for column, value in zip(columns[1:], values, strict=True):
            size, _, other = column.removeprefix("batch ").partition(": less than ")
            own = float(records.added[model, method, int(size)])
            if other:
                own = 1 - own / records.added[model, other, int(size)]
            yield f"Cost, {method}: {column}", float(value), own


def _drawn(
    records: Records, part: str, rows: list[list[str]]
) -> Iterator[tuple[str, float, float]]:
    """What a figure of combinations shows: means over the tasks that all of its methods finished,
    to four digits."""
    names, gap = [row[0] for row in rows], "gap" in part
    for name, value, _ in rows:
        means = [
            statistics.fmean(
                abs(r["train"] - r["test"]) if gap else r["test"] for r in own[name, task]
            )
            for own in records.found.values()
            for task in records.types
            if all(own.get((other, task)) for other in names)
        ]
        yield f"Combination, {part}, {name}", float(value), round(statistics.fmean(means), 4)


def _combination(
    records: Records, part: str, columns: list[str], rows: list[list[str]], several: bool
) -> Iterator[tuple[str, float, float]]:
    gap, sums = "gap" in part, defaultdict(list)
    for title, *values in rows:
        for method, value in zip(columns[1:], values, strict=True):
            if title == "Mean":
                own = statistics.fmean(sums[method])
            else:
                name, model = (
                    title.rsplit(", ", 1) if several else (title, next(iter(records.found)))
                )
                results = records.found[model][method, records.titles[name]]
                own = statistics.fmean(
                    abs(r["train"] - r["test"]) if gap else r["test"] for r in results
                )
                sums[method].append(own)
            yield f"Combination, {part}, {title}, {method}", float(value), own


def _short(run: dict[str, Any], shots: dict[str, int | None]) -> bool:
    """Whether a run has solved a task with other examples than the plan's, for a space alone."""
    task = run["task"]
    return run["kind"] == "final" and task.get("shots") != shots[task["name"]]


def main() -> None:
    count, wrong = 0, []
    for what, shown, own in checks(Path(sys.argv[1])):
        count += 1
        if not math.isclose(shown, own, rel_tol=CLOSE, abs_tol=CLOSE):
            wrong.append(f"{what}: {shown} in the report, {own} from the records")
    print(f"{count} numbers of the report recomputed, {len(wrong)} differ")
    if wrong or not count:
        sys.exit("\n".join(wrong[:20]) or "the report has no table that could be checked")


if __name__ == "__main__":
    main()
