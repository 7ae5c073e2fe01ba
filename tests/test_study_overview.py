"""The numbers and pages of a study over many tasks, against SQL over the same records.

The records are made up: two models, five tasks of three types, a combination with its orders, a
transfer and a cost measurement.
"""

import dataclasses
import json
import random
import re
import shutil
from html import escape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import study_fakes as fakes
from deltune.study import numbers
from deltune.study.overview import Overview, overviews
from deltune.study.page.findings import overall
from deltune.study.page.performance import performance
from deltune.study.plan import ModelInfo, Plan, write_plan
from deltune.study.query import query
from deltune.study.records import write_record
from deltune.study.report import render
from deltune.study.state import State
from deltune.study.summary import tables

pytestmark = pytest.mark.xdist_group("overview")

TYPES = {"a": "sentiment", "b": "sentiment", "c": "topic", "d": "inference", "e": "inference"}
CHANCE = {"a": 0.5, "b": 0.5, "c": 0.25, "d": 0.99, "e": 0.5}
TEST = 60
KINDS = {"Full": "full", "Head": "head", "LoRA": "lora", "BitFit": "bitfit"}


def made() -> Plan:
    methods = [fakes.make_method(name, kind) for name, kind in KINDS.items()]
    subsets = {"nothing": (), "LoRA2": ("LoRA2",), "BF": ("BF",), "LoRA2+BF": ("LoRA2", "BF")}
    methods += [
        dataclasses.replace(fakes.make_method(name, "lora" if parts else "head"), parts=parts)
        for name, parts in subsets.items()
    ]
    order = dataclasses.replace(
        fakes.make_method("LoRA2 > BF", "sequence"), stages=("LoRA2", "BF"), learning_rate=()
    )
    plan = fakes.make_plan([*methods, order], (0, 1))
    toy = plan.tasks[0]
    tasks = tuple(
        dataclasses.replace(toy, name=name, title=f"Task {name}", type=kind, chance=CHANCE[name])
        for name, kind in TYPES.items()
    )
    models = (ModelInfo("small", "embedding"), ModelInfo("large"))
    cost = {"lengths": [8, 64], "batch_sizes": [1, 4], "rounds": [3]}
    return dataclasses.replace(
        plan, tasks=tasks, models=models, transferred=("LoRA",), cost=cost, train_metric=True
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return filled(tmp_path_factory.mktemp("many"))


def filled(folder: Path) -> Path:
    """A study with every question, of made-up numbers."""
    draw, plan = random.Random(0), made()
    write_plan(plan, folder)
    state = State(plan, folder)
    for cell in plan.cells():
        for run in state.finals(cell):
            tops = [draw.uniform(0.3, 0.95) for _ in range(3)]
            total = 22_000_000 if cell.model == "large" else 9_000_000
            result = fakes.make_result(draw.uniform(0.4, 0.98), curve=tuple(tops))
            result = dataclasses.replace(result, train=draw.uniform(0.5, 1.0), total=total)
            record = fakes.make_record(run, result)
            write_record(folder, record)
            state.add(record)
            follower = plan.transfer_run(run)
            if follower:
                rows = [
                    {"source": cell.task, "target": t["name"], "value": draw.uniform(0.3, 0.9),
                     "reason": ""}
                    for t in follower.targets or ()
                ]  # fmt: skip
                if cell.task == "a":
                    rows[0] |= {"value": None, "reason": "another label set"}
                write_record(folder, fakes.make_record(follower, None, measures=rows))
    for run in plan.bare_runs():
        rows = [{"source": "", "target": t["name"], "value": 0.77, "reason": ""}
                for t in run.targets or ()]  # fmt: skip
        write_record(folder, fakes.make_record(run, None, measures=rows))
    for run in plan.cost_runs():
        if run.kind == "cost":
            rows = [
                {"method": one["method"], "what": what, "length": n, "seconds": draw.random(),
                 "low": 0.1, "high": 1.0}
                for one in run.targets or () for what in ("forward", "backward", "inference")
                for n in (8, 64)
            ]  # fmt: skip
        else:
            rows = [
                {"method": run.method, "batch_size": size, "length": 64,
                 "peak_bytes": int(1e9 * size + draw.random() * 1e8), "resting_bytes": 10**8}
                for size in (1, 4)
            ]  # fmt: skip
        write_record(folder, fakes.make_record(run, None, measures=rows))
    return folder


@pytest.fixture(scope="module")
def state(folder: Path) -> State:
    return State(made(), folder)


def _view(state: State, model: str = "small") -> Overview:
    return next(view for view in overviews(tables(state)) if view.model == model)


def _sql(folder: Path, sql: str) -> dict:
    return {row[0]: row[1] for row in query(folder, sql)[1]}


PER_TASK = (
    "SELECT method, task, avg(test) AS test FROM runs WHERE kind = 'final' AND model = 'small' "
    "GROUP BY ALL"
)
FLOOR = {n: c + 2 * (c * (1 - c) / TEST) ** 0.5 for n, c in CHANCE.items()}
VALUES = ", ".join(f"('{n}', '{TYPES[n]}', {CHANCE[n]}, {FLOOR[n]})" for n in TYPES)
KNOWN = f"(VALUES {VALUES})"
SCORES = (
    f"WITH scores AS ({PER_TASK}), known(task, type, chance, floor) AS {KNOWN}, "
    "f AS (SELECT task, test AS fulltest FROM scores WHERE method = 'Full') "
)


def test_averages_are_those_of_sql(folder: Path, state: State) -> None:
    view = _view(state)
    means = _sql(folder, SCORES + "SELECT method, avg(test) FROM scores GROUP BY 1")
    relative = _sql(
        folder, SCORES + "SELECT method, avg(test / fulltest) FROM scores JOIN f USING (task) "
        "GROUP BY 1",
    )  # fmt: skip
    above = _sql(
        folder,
        SCORES + "SELECT method, avg((test - chance) / (fulltest - chance)) FROM scores "
        "JOIN f USING (task) JOIN known USING (task) WHERE fulltest > floor GROUP BY 1",
    )
    ranks = _sql(
        folder,
        SCORES + ", r AS (SELECT method, rank() OVER (PARTITION BY task ORDER BY test DESC) AS n "
        "FROM scores) SELECT method, avg(n) FROM r GROUP BY 1",
    )
    wins = _sql(
        folder, SCORES + "SELECT method, avg(CAST(test > fulltest AS INT)) FROM scores "
        "JOIN f USING (task) WHERE method <> 'Full' GROUP BY 1",
    )  # fmt: skip
    gaps = _sql(
        folder, "WITH g AS (SELECT method, task, avg(abs(train - test)) AS gap FROM runs "
        "WHERE kind = 'final' AND model = 'small' GROUP BY ALL) "
        "SELECT method, avg(gap) FROM g GROUP BY 1",
    )  # fmt: skip
    assert set(means) == {method.name for method in view.methods} and len(means) == 9
    for name in means:
        assert view.average(name) == pytest.approx(means[name])
        assert view.relative(name) == pytest.approx(relative[name])
        assert view.corrected(name) == pytest.approx(above[name])
        assert view.ranks[name] == pytest.approx(ranks[name])
        assert view.gap(name) == pytest.approx(gaps[name])
    assert {n: c.wins for n, c in view.comparisons.items()} == pytest.approx(wins)
    beaten = _sql(
        folder, SCORES + "SELECT 'n', count(*) FROM f JOIN known USING (task) "
        "WHERE fulltest > floor",
    )  # fmt: skip
    assert view.above_chance == beaten["n"] < 5 and view.types == [
        "inference",
        "sentiment",
        "topic",
    ]
    for kind in view.types:
        typed = _sql(
            folder, SCORES + "SELECT method, avg(test) FROM scores JOIN known USING (task) "
            f"WHERE type = '{kind}' GROUP BY 1",
        )  # fmt: skip
        for name in typed:
            assert view.average(name, kind) == pytest.approx(typed[name])


def test_convergence_is_that_of_the_curves(folder: Path, state: State) -> None:
    view = _view(state)
    wanted = _sql(
        folder,
        "WITH c AS (SELECT r.method, r.digest, r.steps, curves.step, curves.dev, "
        "max(curves.dev) OVER (PARTITION BY r.digest) AS best FROM curves "
        "JOIN runs r USING (digest) WHERE r.kind = 'final' AND r.model = 'small'), "
        "first AS (SELECT method, digest, min(step / steps) AS share FROM c "
        "WHERE dev >= 0.9 * best GROUP BY ALL) SELECT method, avg(share) FROM first GROUP BY 1",
    )
    for name, share in wanted.items():
        assert view.steps(name)[0] == pytest.approx(share)
        points = view.curve(name, 5)
        assert points[0][0] == pytest.approx(1 / 3) and points[-1][0] == 1.0
    ends = _sql(
        folder,
        "SELECT method, avg(curves.dev) FROM curves JOIN runs USING (digest) "
        "WHERE step = 30 AND kind = 'final' AND model = 'small' GROUP BY 1",
    )
    assert {n: view.curve(n, 5)[-1][1] for n in ends} == pytest.approx(ends)


def test_mean_curves_begin_where_they_show_most() -> None:
    """A task that is first evaluated late takes no part in them, instead of cutting all short."""

    def table(name: str, first: int, dev: float) -> Any:
        result = SimpleNamespace(curve=[[first, 0.0, 0.5], [10, 1.0, dev]], steps=10)
        row = SimpleNamespace(name="LoRA", records=[SimpleNamespace(result=result)])
        return SimpleNamespace(task=name, rows=[row])

    view = Overview("small", (table("a", 1, 0.7), table("b", 2, 0.9), table("c", 9, 0.1)), ())
    assert view.begun == (0.2, ["a", "b"])  # 2 tasks x 0.8, 1 x 0.9, 3 x 0.1
    found = view.curve("LoRA", 2)
    assert found == [(0.2, pytest.approx((0.5 + 0.2 / 9 + 0.5) / 2)), (1.0, pytest.approx(0.8))]


def _plain(page: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))


def test_the_page_says_the_numbers(folder: Path, state: State) -> None:
    page, view = render(state), _view(state)
    text = _plain(page)
    for name in ("Full", "LoRA", "LoRA2+BF"):
        assert numbers.metric(view.average(name)) in text
        assert numbers.percent(view.corrected(name) or 0.0) in text
        assert f"{view.ranks[name]:.2f}" in text
    headings = ["Performance of small", "Performance of large", "Convergence of small", "Cost"]
    for heading in [*headings, "Combination", "Scale", "Transfer", "Critical differences"]:
        assert heading in text, heading
    assert "One after another" in text and "LoRA2 &gt; BF" in page
    assert "Task a, small, stage by stage" in text
    assert not re.search(r'(src|href)="http', page)
    for sentence in overall(view):
        assert escape(sentence) in page


def test_transfer_is_relative_to_the_targets_own_delta(folder: Path, state: State) -> None:
    view, page = _view(state), render(state)
    own = dict(zip([t.name for t in view.tasks], [r.test for r in view.rows("LoRA")], strict=True))
    first = {
        cell.task: record.result.test
        for cell in state.cells
        if (cell.model, cell.method) == ("small", "LoRA")
        for record in state.results(cell)
        if record.spec.seed == 0 and record.result
    }
    assert first != own  # the heat map is of the first seed, whose delta was tried
    shown = 0
    for cell in state.cells:
        if (cell.model, cell.method) != ("small", "LoRA"):
            continue
        for run in state.followers(cell):
            for row in state.records[run.digest()].measures or ():
                target = row["target"]
                if row["value"] is None or first[target] <= FLOOR[target]:
                    continue
                value = (row["value"] - CHANCE[target]) / (first[target] - CHANCE[target])
                assert f"Task {cell.task} on Task {target}: {value:.2f}" in page
                shown += 1
    assert shown >= 12 and "on Task d: –" in page
    assert [run.model["name"] for run in state.bare] == ["small"]
    for name, value in first.items():
        if value > FLOOR[name]:
            relative = (0.77 - CHANCE[name]) / (value - CHANCE[name])
            assert f"the model as it is on Task {name}: {relative:.2f}" in page


def test_memory_is_what_training_adds(state: State) -> None:
    page = render(state)
    text = _plain(page)
    rows = [row for run in state.costs for row in state.records[run.digest()].measures or ()
            if "peak_bytes" in row]  # fmt: skip
    assert len(rows) == 2 * 8 * 2
    for row in rows:
        added = row["peak_bytes"] - row["resting_bytes"]
        assert numbers.size(added) in text
        drawn = f"{row['method']}: {round(added / 1e6, 1):.3f} at {row['batch_size']}<"
        assert drawn in page or escape(drawn.removesuffix("<")) in page


@pytest.mark.parametrize("models", [2, 1])
def test_the_recheck_beside_the_studies_finds_each_number_and_any_wrong_one(
    folder: Path, models: int, tmp_path: Path
) -> None:
    copied, plan = tmp_path / "study", made()
    plan = dataclasses.replace(plan, models=plan.models[:models])
    shutil.copytree(folder / "runs", copied / "runs")
    for path in (copied / "runs").iterdir():
        if json.loads(path.read_text())["run"]["model"]["name"] not in {
            m.name for m in plan.models
        }:
            path.unlink()
    write_plan(plan, copied)
    state = State(plan, copied)
    (copied / "report.html").write_text(render(state))
    done = fakes.rechecked(copied)
    assert done.returncode == 0, done.stderr
    count = re.match(r"(\d+) numbers of the report recomputed, 0 differ", done.stdout)
    assert count and int(count[1]) > 200 * models
    for path in (copied / "runs").iterdir():
        record = json.loads(path.read_text())
        if record["run"]["kind"] == "transfer" and record["run"]["method"] == "LoRA":
            for row in record["measures"]:
                row["value"] = 0.123 if row["target"] == "a" else row["value"]
            path.write_text(json.dumps(record))
    again = fakes.rechecked(copied)
    assert again.returncode and "Transfer, LoRA with small: b on a" in again.stderr
    (cell,) = [c for c in state.cells if (c.model, c.task, c.method) == ("small", "a", "LoRA")]
    path = copied / "runs" / f"{state.results(cell)[0].digest}.json"
    path.write_text(re.sub(r'"test": [\d.]+', '"test": 0.123', path.read_text()))
    again = fakes.rechecked(copied)
    section = "Performance of small" if models > 1 else "Performance"
    assert again.returncode and f"{section}, Task a, LoRA" in again.stderr


def test_nothing_finished_says_nothing_across_tasks(tmp_path: Path) -> None:
    write_plan(made(), tmp_path)
    page = render(State(made(), tmp_path))
    assert "Performance" not in page and "Transfer" not in page


SUBSETS = ("AP", "BF", "AP+BF", "PT", "AP+PT", "BF+PT", "AP+BF+PT")
PUBLISHED = {
    "CoLA": (66.6, 63.5, 65.9, 42.7, 63.1, 63.7, 64.4),
    "SST-2": (95.8, 95.6, 95.7, 95.3, 95.7, 95.3, 95.5),
    "MRPC": (92.7, 91.9, 93.0, 85.4, 92.0, 92.2, 92.9),
    "STS-B": (91.4, 90.7, 90.5, 83.0, 90.5, 90.3, 90.9),
    "QQP": (83.5, 83.5, 84.4, 75.0, 81.9, 83.6, 84.4),
    "MNLI": (88.6, 88.0, 89.0, 77.9, 88.9, 88.0, 88.9),
    "QNLI": (93.7, 93.4, 94.2, 86.2, 94.2, 93.2, 94.4),
    "RTE": (86.8, 86.2, 84.5, 74.4, 83.6, 85.7, 84.7),
}
"""Adapter, BitFit and prompt with RoBERTa-large on GLUE, all data, no template: means of three
seeds in guang-yng/FS-PBA@8c19d3c, behind table 2 of Ding et al., "Parameter-efficient fine-tuning
of large-scale pre-trained language models", 2023, Nature Machine Intelligence 5."""
AVERAGES = (87.4, 86.6, 87.1, 77.5, 86.2, 86.5, 87.0)
"""What is printed there."""


def test_a_published_table_of_combinations_has_the_published_averages(tmp_path: Path) -> None:
    named = {"nothing": (), **{name: tuple(name.split("+")) for name in SUBSETS}}
    methods = [
        dataclasses.replace(fakes.make_method(name, "lora" if parts else "head"), parts=parts)
        for name, parts in named.items()
    ]
    plan = fakes.make_plan(methods, (0,))
    tasks = tuple(dataclasses.replace(plan.tasks[0], name=n, title=n) for n in PUBLISHED)
    plan = dataclasses.replace(plan, tasks=tasks)
    write_plan(plan, tmp_path)
    for cell in plan.cells():
        scores = dict(zip(SUBSETS, PUBLISHED[cell.task], strict=True))
        (run,) = plan.final_runs(cell, 1e-3)
        result = fakes.make_result(scores.get(cell.method, 0.0) / 100)
        write_record(tmp_path, fakes.make_record(run, result))
    page = render(State(plan, tmp_path)).split("<h3>At once</h3>")[1]
    mean = next(row for row in page.split("<tr>") if ">Mean<" in row)
    values = [float(text) for text in re.findall(r'data-v="([\d.]+)"', mean)]
    assert values[1:] == pytest.approx([average / 100 for average in AVERAGES], abs=5.1e-4)


def test_without_full_fine_tuning_nothing_is_held_against_it(state: State) -> None:
    view = _view(state)
    kept = [
        dataclasses.replace(table, rows=tuple(row for row in table.rows if row.name != "Full"))
        for table in view.tables
    ]
    bare = Overview(view.model, tuple(kept), view.left_out)
    for one, there in ((view, True), (bare, False)):
        text = _plain(performance(one, "Performance"))
        assert numbers.metric(one.average("LoRA")) in text and f"{one.ranks['LoRA']:.2f}" in text
        for words in ("full fine-tuning", "of full above chance", "wins", "difference to full"):
            assert (words in text) == there, words
