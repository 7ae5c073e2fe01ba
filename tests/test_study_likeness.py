"""Which codes point in similar directions. Oracles: numpy over all pairs of codes written out, the
hierarchical clustering of scipy, and the drawing itself, read again."""

import dataclasses
import math
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from scipy.cluster import hierarchy
from scipy.spatial.distance import squareform

import study_fakes as fakes
from deltune.study.page.likeness import Codes, alike, cosine_figure, merges
from deltune.study.plan import Plan, SubspaceInfo, write_plan
from deltune.study.records import write_record
from deltune.study.report import write_report
from deltune.study.state import State

Table = dict[str, Codes]


def made_up(tasks: int, methods: str, seeds: int, length: int) -> Table:
    """Codes of very different sizes."""
    draw = np.random.default_rng(7)
    return {
        f"t{task}": {
            (method, seed): (draw.normal(size=length) * 10 ** draw.uniform(-3, 3)).tolist()
            for method in methods
            for seed in range(seeds)
        }
        for task in range(tasks)
    }


def by_hand(codes: Table, wanted: Any) -> float:
    """The mean cosine of all pairs of codes that are wanted; each has (task, method, seed)."""
    every = [
        (task, *key, np.array(code)) for task, own in codes.items() for key, code in own.items()
    ]
    found = [
        u @ v / math.sqrt((u @ u) * (v @ v))
        for place, (*one, u) in enumerate(every)
        for *other, v in every[place + 1 :]
        if wanted(one, other)
    ]
    return float(np.mean(found)) if found else math.nan


def test_cosines_are_means_over_pairs_of_codes() -> None:
    codes = made_up(4, "ABC", 3, 5)
    del codes["t1"]["B", 2], codes["t2"]["C", 0], codes["t2"]["C", 1]  # type: ignore[attr-defined]
    found = alike(codes)
    for row, task in enumerate(codes):
        for column, other in enumerate(codes):
            right = by_hand(
                codes, lambda a, b, t=task, o=other: {a[0], b[0]} == {t, o} and a[1] == b[1]
            )
            assert found.cosines[row][column] == pytest.approx(right)
            assert found.cosines[row][column] == found.cosines[column][row]
        right = by_hand(
            codes, lambda a, b, t=task: a[0] == b[0] == t and a[2] == b[2] and a[1] != b[1]
        )
        assert found.methods[row] == pytest.approx(right)


def test_what_has_no_second_code_has_no_cosine() -> None:
    one = alike({"a": {("A", 0): (1.0, 1.0)}, "b": {("A", 0): (-0.01, -0.01)}})
    assert math.isnan(one.cosines[0][0]) and all(map(math.isnan, one.methods))
    assert one.cosines[0][1] == pytest.approx(-1)
    strange = alike({"a": {("A", 0): (1.0, 1.0)}, "b": {("B", 0): (1.0, 1.0)}})
    assert math.isnan(strange.cosines[0][1])


@pytest.mark.parametrize("count", [2, 3, 9, 24])
def test_clusters_are_those_of_average_linkage(count: int) -> None:
    points = np.random.default_rng(count).normal(size=(count, 6))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    far = 1 - points @ points.T
    np.fill_diagonal(far, 0)
    tree = hierarchy.average(squareform(far, checks=False))
    members = {place: {place} for place in range(count)}
    found = merges(far.tolist())
    assert len(found) == len(tree)
    for step, ((one, other), (first, second, height, _)) in enumerate(
        zip(found, tree, strict=True)
    ):
        assert (set(one), set(other)) == (members[int(first)], members[int(second)])
        assert np.mean([far[a, b] for a in one for b in other]) == pytest.approx(height)
        members[count + step] = set(one) | set(other)
    assert [*found[-1][0], *found[-1][1]] == hierarchy.leaves_list(tree).tolist()


def test_equally_near_ones_are_joined_in_their_order_and_unknown_ones_last() -> None:
    assert merges([[0.0] * 4] * 4) == [((0,), (1,)), ((2,), (3,)), ((0, 1), (2, 3))]
    nan = math.nan
    far = [[nan, nan, 0.9, nan], [nan, nan, nan, 0.1], [0.9, nan, nan, nan], [nan, 0.1, nan, nan]]
    assert merges(far) == [((1,), (3,)), ((0,), (2,)), ((1, 3), (0, 2))]


def shown(cosines: list[list[float]]) -> tuple[list[str], ElementTree.Element, Any]:
    """Names of tasks, the picture of their map, and the figure."""
    names = [f"task number {place}" for place in range(len(cosines))]
    figure = cosine_figure(names, cosines, "t")
    return names, ElementTree.fromstring(figure.picture), figure


@pytest.mark.parametrize("count", [2, 9, 50])
def test_the_map_has_the_cosines_in_the_order_of_the_clusters(count: int) -> None:
    points = np.random.default_rng(count).normal(size=(count, 4))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    cosines = points @ points.T
    names, picture, figure = shown(cosines.tolist())
    labels = [text for text in picture.findall("text") if text.attrib["class"] == "label ink"]
    rows = [text for text in labels if "y" in text.attrib]
    tree = hierarchy.average(squareform(1 - cosines, checks=False))
    order = hierarchy.leaves_list(tree).tolist()
    assert [text.text for text in rows] == [names[place] for place in order]
    heights = [float(text.attrib["y"]) - 4 for text in rows]
    across = [re.findall(r"[\d.]+", t.attrib["transform"]) for t in labels if t not in rows]
    _, _, width, height = map(float, picture.attrib["viewBox"].split())
    cells = [group for group in picture.findall("g") if group[0][0].text]
    assert len(cells) == count**2
    for cell in cells:
        box = {name: float(cell[0].attrib[name]) for name in ("x", "y", "width", "height")}
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        row = min(range(count), key=lambda k: abs(heights[k] - y))
        column = min(range(count), key=lambda k: abs(float(across[k][0]) - 4 - x))
        assert heights[row] == pytest.approx(y, abs=0.2)
        assert float(across[column][0]) - 4 == pytest.approx(x, abs=0.2)
        value = cosines[order[row], order[column]]
        assert cell[0][0].text == f"{names[order[row]]} and {names[order[column]]}: {value:.3f}"
        assert float(cell.attrib["style"].removeprefix("--v:")) == pytest.approx(
            (value + 1) / 2, abs=6e-4
        )
        words = None if count == 50 else f"{value:.2f}".replace("-0.00", "0.00")
        assert cell[1].text == words
        assert box["width"] == box["height"] >= 12  # a line of names
        assert box["x"] + box["width"] < width and box["y"] + box["height"] < height
    assert {(a, b, v) for a, b, v in figure.data} == {
        (names[order[i]], names[order[j]], round(cosines[order[i], order[j]], 4))
        for i in range(count)
        for j in range(i, count)
    }


def test_the_colours_are_explained_from_minus_one_to_one_and_what_is_unknown_is_empty() -> None:
    _, picture, figure = shown([[math.nan, 0.0], [0.0, math.nan]])
    cells = [group for group in picture.findall("g") if group[0][0].text]
    assert [cell.attrib["style"] for cell in cells] == ["--v:0.500"] * 2
    assert [value for *_, value in figure.data] == ["", 0.0, ""]
    ticks = {
        float(text.text or ""): float(text.attrib["y"]) - 4
        for text in picture.findall("text")
        if text.attrib["class"] == "tick"
    }
    assert set(ticks) == {-1.0, -0.5, 0.0, 0.5, 1.0}
    bar = [group for group in picture.findall("g") if not group[0][0].text]
    for box in bar:
        middle = float(box[0].attrib["y"]) + float(box[0].attrib["height"]) / 2
        share = (ticks[-1] - middle) / (ticks[-1] - ticks[1])
        assert float(box.attrib["style"].removeprefix("--v:")) == pytest.approx(share, abs=0.01)


TYPES = {"p": "one", "q": "one", "r": "two", "new": "two"}


def plan_of(types: dict[str, str], seeds: tuple[int, ...], tune_seen: bool) -> Plan:
    methods = [fakes.make_method(name, "lora") for name in "BC"]
    plan = fakes.make_plan(methods, seeds)
    tasks = tuple(
        dataclasses.replace(plan.tasks[0], name=name, title=f"{name}: toy", type=kind)
        for name, kind in types.items()
    )
    sub = SubspaceInfo(
        ("new",), ("B", "C"), {"random": [1, 3, 5]}, (1e-2,), methods[0].settings, {},
        tune_seen=tune_seen,
    )  # fmt: skip
    return dataclasses.replace(plan, tasks=tasks, subspace=sub)


def answered(plan: Plan, folder: Path) -> dict[int, Table]:
    """A study in a folder, and its codes by the length of the space: those of q in the space of
    three point against those of p but for a little, and one of r is zero."""
    write_plan(plan, folder)
    state, draw = State(plan, folder), np.random.default_rng(3)
    lengths: dict[str, int] = {}
    codes: dict[int, Table] = {1: {}, 3: {}, 5: {}}
    while run := state.next_run():
        rows: list[dict[str, Any]] = []
        if run.kind == "space":
            lengths[run.digest()] = run.settings["dimension"]
            rows = [{"task": task, "method": name, "which": which, "error": 0.5, "bound": 0.4,
                     "value": 0.7} for task, which in (("p", "seen"), ("new", "unseen"))
                    for name in "BC"]  # fmt: skip
        if run.kind == "code":
            length, task = lengths[run.settings["space"]], run.task["name"]
            code = draw.normal(size=length) + (length == 3) * {"p": 3, "q": -3}.get(task, 0)
            if (task, run.method, run.seed) == ("r", "B", plan.seeds[0]):
                code = np.zeros(length)
            else:
                own = codes[length].setdefault(task, {})
                own[run.method, run.seed] = code.tolist()  # type: ignore[index]
            rows = [{"decoder": name, "value": 0.7} for name in "BC"] + [{"code": code.tolist()}]
        record = fakes.make_record(run, fakes.make_result(0.8) if run.kind == "final" else None)
        record = dataclasses.replace(record, measures=rows)
        write_record(folder, record)
        state.add(record)
    return codes


def cells(page: str) -> list[list[str]]:
    """The table of the page: sortable values."""
    table = page.split("<h3>Likeness of codes</h3>")[1].split("</table>")[0]
    return [re.findall(r'data-v="([^"]*)"', line) for line in table.split("<tr>")[2:]]


@pytest.mark.parametrize(
    ("types", "seeds"), [(TYPES, (0, 1, 2)), (dict.fromkeys(TYPES, "one"), (4,))]
)
def test_the_table_has_the_means_of_tasks_types_and_methods(
    types: dict[str, str], seeds: tuple[int, ...], tmp_path: Path
) -> None:
    """Those of codes of one number have no direction; with one seed, or type, some are not there.
    The program that rechecks reports finds the same by sums of directions."""
    codes = answered(plan_of(types, seeds, tune_seen=True), tmp_path)
    path = write_report(tmp_path)
    page = path.read_text()
    rows = cells(page)
    assert [row[:2] for row in rows] == [["random, tiny", "3"], ["random, tiny", "5"]]
    assert page.count("<h3>Cosine of codes: ") == 2
    for _, length, *values in rows:
        own, names = codes[int(length)], list(codes[int(length)])

        def pair(a: str, b: str, own: Table = own) -> float:
            return by_hand(own, lambda c, d: {c[0], d[0]} == {a, b} and c[1] == d[1])

        def other(a: str, own: Table = own) -> float:
            return by_hand(own, lambda c, d: c[0] == d[0] == a and c[2] == d[2] and c[1] != d[1])

        both = [(a, b) for place, a in enumerate(names) for b in names[place + 1 :]]
        parts = [
            [pair(a, a) for a in names],
            [pair(a, b) for a, b in both if types[a] == types[b]],
            [pair(a, b) for a, b in both if types[a] != types[b]],
            [other(a) for a in names],
        ]
        known = [[value for value in part if not math.isnan(value)] for part in parts]
        right = [float(np.mean(part)) if part else -math.inf for part in known]
        assert list(map(float, values)) == pytest.approx(right)
        single = seeds == (4,)
        assert [math.isinf(value) for value in right] == [single, False, single, False]
    done = fakes.rechecked(tmp_path)
    assert done.returncode == 0 and ", 0 differ" in done.stdout, done.stderr
    wrong = {
        "Likeness of codes, random, tiny, 5: other methods": (
            "<h3>Likeness of codes<", ">random, tiny<", ">5<", *['data-v="'] * 3
        ),
        "Cosine of codes: random space of 3, p: toy and p: toy": (
            "<h3>Cosine of codes: random space of 3<", "Data of this figure", ">p: toy</th>",
            ">p: toy<",
        ),
    }  # fmt: skip
    for before in wrong.values():
        at = 0
        for words in (*before, 'data-v="'):
            at = page.index(words, at) + len(words)
        page = page[:at] + "0.123" + page[page.index('"', at) :]
    path.write_text(page)
    done = fakes.rechecked(tmp_path)
    named = [line.partition(": 0.123 in the report")[0] for line in done.stderr.splitlines()]
    assert done.returncode == 1 and sorted(named) == sorted(f"Subspaces, {at}" for at in wrong)


def test_one_task_with_codes_is_like_no_other(tmp_path: Path) -> None:
    answered(plan_of(TYPES, (0, 1), tune_seen=False), tmp_path)
    page = write_report(tmp_path).read_text()
    assert "<h2>Subspaces</h2>" in page and "Likeness of codes" not in page
