"""Combinations, sequences, pilots, transfer, cost and task variants in a study.

Oracles: the sets of subsets and orders written out; a fake worker; and, for a real study of a tiny
model, the same training by hand in this process.
"""

import dataclasses
import os
import sys
from pathlib import Path

import pytest
import torch

import deltune as dt
import study_fakes as fakes
import tasks_toys
from deltune.study import measure, pool, trial
from deltune.study.engine import run_study
from deltune.study.plan import Cell, Plan, read_plan
from deltune.study.reading import combined
from deltune.study.records import Record, read_record
from deltune.study.resolve import plan_study
from deltune.study.settings import Combination
from deltune.study.state import State
from deltune.tasks.objectives import objective_for
from deltune.tasks.task import Task

pytestmark = pytest.mark.xdist_group("kinds")


@pytest.fixture
def _fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "COMMAND", [sys.executable, fakes.__file__])


def test_a_combination_is_every_subset_and_every_order() -> None:
    parts = {"AP": "adapter(width=4)", "BF": "bitfit", "PT": "prompt(tokens=2)"}
    made = combined(Combination(parts, (1e-3,), {"AP+BF": [1e-4, 1e-2]}, orders=True))
    subsets = {entry.name: (entry.spec, entry.learning_rate) for entry, _ in made[:8]}
    assert list(subsets) == ["nothing", "AP", "BF", "PT", "AP+BF", "AP+PT", "BF+PT", "AP+BF+PT"]
    assert subsets["nothing"] == ("head", (1e-3,))
    assert subsets["AP+BF"] == ("adapter(width=4) + bitfit", (1e-4, 1e-2))
    assert [entry.stages for entry, _ in made[8:]] == [
        ("AP", "BF", "PT"), ("AP", "PT", "BF"), ("BF", "AP", "PT"),
        ("BF", "PT", "AP"), ("PT", "AP", "BF"), ("PT", "BF", "AP"),
    ]  # fmt: skip
    assert [parts for _, parts in made][4] == ("AP", "BF")
    assert combined(None) == []


def pilots_plan(**other: object) -> Plan:
    plan = fakes.make_plan([fakes.make_method("LoRA", "lora", (1e-4, 1e-3, 1e-2))], (0,))
    toy = plan.tasks[0]
    tasks = [dataclasses.replace(toy, name=name) for name in ("a", "b", "c")]
    tasks.append(dataclasses.replace(toy, name="d", kind="multiple_choice"))
    return dataclasses.replace(plan, tasks=tuple(tasks), pilots=("a", "b"), **other)


def test_pilots_choose_for_all_by_their_mean(tmp_path: Path) -> None:
    plan = pilots_plan()
    cells = list(plan.cells())
    assert [len(plan.selection_runs(cell)) for cell in cells] == [3, 3, 0, 0]
    state = State(plan, tmp_path)
    devs = {"a": (0.9, 0.5, 0.6), "b": (0.1, 0.6, 0.55)}  # each would choose another for itself
    for cell in cells[:2]:
        for run, dev in zip(plan.selection_runs(cell), devs[cell.task], strict=True):
            assert state.chosen(cells[2]) is None
            state.add(fakes.make_record(run, fakes.make_result(None, dev=dev)))
    assert {state.chosen(cell) for cell in cells} == {1e-2}  # 0.575 against 0.5 and 0.55
    assert state.status().total == 6 + 4


def test_a_rate_that_fails_on_a_pilot_is_not_chosen(tmp_path: Path) -> None:
    plan = pilots_plan()
    state = State(plan, tmp_path)
    for cell in list(plan.cells())[:2]:
        for run in plan.selection_runs(cell):
            bad = cell.task == "b" and run.learning_rate == 1e-3
            failure = fakes.Failure("TrainError", "the loss is NaN") if bad else None
            result = None if bad else fakes.make_result(None, dev=fakes.fake_dev(run))
            state.add(fakes.make_record(run, result, failure))
    assert state.chosen(Cell("tiny", "c", "LoRA")) == 1e-4


@pytest.mark.usefixtures("_fake")
def test_sequences_take_the_rates_of_their_stages(tmp_path: Path) -> None:
    one = fakes.make_method("A", "adapter", (1e-4, 1e-3))
    two = fakes.make_method("B", "bitfit", (1e-3, 1e-2))
    both = dataclasses.replace(one, name="A > B", stages=("A", "B"), learning_rate=())
    plan = fakes.make_plan([both, one, two], (0,))
    status = run_study(plan, tmp_path, workers=2)
    assert (status.total, status.finished, status.left) == (7, 7, 0)
    (record,) = State(plan, tmp_path).results(Cell("tiny", "toy", "A > B"))
    assert [s["settings"]["learning_rate"] for s in record.spec.stages or ()] == [1e-3, 1e-3]
    assert [s["spec"]["kind"] for s in record.spec.stages or ()] == ["adapter", "bitfit"]


@pytest.mark.usefixtures("_fake")
def test_a_sequence_is_blocked_with_its_stage(tmp_path: Path) -> None:
    bad = fakes.make_method("Fails", "adapter", (1e-4, 1e-3))
    good = fakes.make_method("B", "bitfit")
    both = dataclasses.replace(good, name="both", stages=("B", "Fails"), learning_rate=())
    status = run_study(fakes.make_plan([bad, good, both], (0, 1)), tmp_path, workers=2)
    assert (status.failed, status.finished, status.blocked, status.left) == (2, 2, 4, 0)


@pytest.mark.usefixtures("_fake")
def test_transfer_follows_the_first_seed_and_cost_runs_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_SECONDS", "0.2")
    plan = pilots_plan(
        transferred=("LoRA",), cost={"lengths": [8], "batch_sizes": [1], "rounds": [2]}
    )
    plan = dataclasses.replace(plan, seeds=(5, 6))
    status = run_study(plan, tmp_path, workers=2)
    assert (status.total, status.finished, status.left) == (6 + 8 + 4 + 2, 20, 0)
    state = State(plan, tmp_path)
    tried = [run for cell in state.cells for run in state.followers(cell)]
    assert [run.seed for run in tried] == [5] * 4
    assert [t["name"] for t in tried[0].targets or ()] == ["b", "c", "d"]
    assert plan.keeps(state.finals(state.cells[0])[0])
    assert not plan.keeps(state.finals(state.cells[0])[1])
    for run in plan.cost_runs():
        record = read_record(tmp_path, run)
        assert record and record.measures == [{"running": 0}]  # its own mark is gone by then


@pytest.mark.usefixtures("_fake")
def test_a_final_run_that_failed_has_no_follower(tmp_path: Path) -> None:
    plan = fakes.make_plan([fakes.make_method("Fails", "lora"), fakes.make_method("B", "bitfit")])
    toy = plan.tasks[0]
    tasks = (toy, dataclasses.replace(toy, name="other"))
    plan = dataclasses.replace(plan, tasks=tasks, transferred=("Fails", "B"))
    status = run_study(plan, tmp_path, workers=2)
    assert (status.total, status.finished, status.failed) == (12, 6, 4)
    assert (status.blocked, status.left) == (2, 0)


STUDY = """
[[models]]
name = "{home}/model"
head = "classification"
[[models]]
name = "{home}/model"
title = "half"
head = "classification"
layers = 1
[[tasks]]
name = "{home}/task"
type = "sentiment"
[[tasks]]
name = "{home}/task"
title = "few"
template = "{{input}} It was {{target}}"
shots = 3
[[tasks]]
name = "{home}/other"
budget = {{ train = 12 }}
selection = {{ train = 10, dev = 2 }}
[study]
name = "Kinds"
seeds = [13]
train_metric = true
[budget]
train = 16
[train]
num_train_epochs = 1
per_device_train_batch_size = 8
[combination]
parts = {{ AP = "adapter(width=2)", BF = "bitfit" }}
learning_rate = [1e-2]
orders = true
[transfer]
methods = []
[cost]
lengths = [4, 8]
batch_sizes = [1, 2]
rounds = 2
"""


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A study of a tiny model, run to its end."""
    home = tasks_toys.home(tmp_path_factory.mktemp("kinds"))
    tasks_toys.write_task(home / "other", ("no", "yes", "maybe"))
    file = home / "study.toml"
    file.write_text(STUDY.format(home=home))
    workers = len(os.sched_getaffinity(0))
    status = run_study(plan_study(file), home / "out", workers=workers)
    assert status.failed == 0 and status.done, State(
        read_plan(home / "out"), home / "out"
    ).failures()
    return home, home / "out"


def _record(folder: Path, model: str, task: str, method: str) -> Record:
    (found,) = State(read_plan(folder), folder).results(Cell(model, task, method))
    return found


def _task(home: Path, few: bool) -> Task:
    task = dt.load_task(home / "task")
    return task.few_shot(3, 13) if few else task.limited(train=16)


@pytest.mark.parametrize(
    ("method", "few"), [("AP+BF", False), ("AP > BF", False), ("BF > AP", True)]
)
def test_a_run_is_what_the_same_training_by_hand_gives(done, method: str, few: bool) -> None:
    home, folder = done
    name = "few" if few else f"{home}/task"
    record = _record(folder, f"{home}/model", name, method)
    result, task = record.result, _task(home, few)
    assert result is not None
    model, tokenizer = dt.load_model(
        str(home / "model"), "classification", labels=task.labels, seed=13
    )
    template = "{input} It was {target}" if few else None
    objective = objective_for(task, model, tokenizer, max_length=128, template=template)
    torch.manual_seed(13)
    specs = {"AP": "adapter(width=2)", "BF": "bitfit"}
    stages = [specs[part] for part in method.split(" > ")] if ">" in method else [
        " + ".join(specs.values())
    ]  # fmt: skip
    settings = dt.TrainSettings(
        num_train_epochs=1, per_device_train_batch_size=8, learning_rate=1e-2, seed=13
    )
    losses, curve, count = [], [], 0
    for number, spec in enumerate(stages):
        delta = dt.attach(model, spec, str(number), head=number == 0)
        count += delta.count()
        got = dt.train(model, tokenizer, task, delta, settings, objective=objective)
        curve += [(len(losses) + step, dev) for step, _, dev in got.curve]
        losses += got.losses
    assert result.losses == pytest.approx(losses, abs=1e-5)
    assert [(step, dev) for step, _, dev in result.curve] == curve
    for split, value in (("test", result.test), ("train", result.train)):
        score = dt.evaluate(model, tokenizer, task, split, objective=objective).value
        assert value == pytest.approx(score), split
    assert result.trainable == count and result.steps == len(losses)


def test_a_task_may_have_its_own_budget(tmp_path: Path) -> None:
    home = tasks_toys.home(tmp_path)
    tasks_toys.write_task(home / "other", ("no", "yes", "maybe"))
    file = home / "study.toml"
    file.write_text(STUDY.format(home=home).replace("[1e-2]", "[1e-2, 1e-3]"))
    plan = plan_study(file)
    cells = {cell.task: cell for cell in plan.cells() if cell.method == "AP"}
    for task, train, selection in (
        (f"{home}/other", 12, (10, 2)),
        (f"{home}/task", 16, (16, None)),
    ):
        chosen = plan.selection_runs(cells[task])[0].task
        assert plan.final_runs(cells[task], 1e-2)[0].task["train"] == train
        assert chosen["train"] == selection[0] and chosen["test"] == 0
        assert chosen["dev"] == (selection[1] or plan.task(task).dev)


def test_sizes_of_an_architecture_are_cut_models(done) -> None:
    home, folder = done
    whole = _record(folder, f"{home}/model", "few", "AP").result
    half = _record(folder, "half", "few", "AP").result
    assert whole and half and half.trainable < whole.trainable and half.total < whole.total
    model, _ = dt.load_model(str(home / "model"), "classification", labels=("a", "b"), layers=1)
    assert half.total == sum(p.numel() for p in model.parameters())
    with pytest.raises(dt.DeltuneError, match=r"9 layers .* were asked for and it has 2"):
        dt.load_model(str(home / "model"), "classification", labels=("a", "b"), layers=9)


def test_transfer_is_the_delta_on_another_task(done) -> None:
    home, folder = done
    state = State(read_plan(folder), folder)
    cell = Cell(f"{home}/model", f"{home}/task", "BF")
    (run,) = state.followers(cell)
    record = read_record(folder, run)
    assert record and record.measures
    rows = {row["target"]: row for row in record.measures}
    few, other = rows["few"], rows[f"{home}/other"]
    assert other["value"] is None and "the task has" in other["reason"]
    task = _task(home, True)
    model, tokenizer = dt.load_model(
        str(home / "model"), "classification", labels=task.labels, seed=13
    )
    dt.load(folder / "deltas" / state.finals(cell)[0].digest(), model)
    objective = objective_for(
        task, model, tokenizer, max_length=128, template="{input} It was {target}"
    )
    assert few["value"] == dt.evaluate(model, tokenizer, task, "test", objective=objective).value


def test_cost_has_every_method_length_and_batch_size(done) -> None:
    _, folder = done
    plan = read_plan(folder)
    times, *memories = (read_record(folder, run) for run in plan.cost_runs()[:5])
    assert times and times.measures
    plain = ["nothing", "AP", "BF", "AP+BF"]
    keys = {(row["method"], row["what"], row["length"]) for row in times.measures}
    whats = ("forward", "backward", "inference")
    assert keys == {(m, what, n) for m in plain for what in whats for n in (4, 8)}
    assert all(0 < row["low"] <= row["seconds"] <= row["high"] for row in times.measures)
    for method, record in zip(plain, memories, strict=True):
        assert record and record.measures
        assert [(r["method"], r["batch_size"]) for r in record.measures] == [
            (method, 1),
            (method, 2),
        ]
        assert all(row["peak_bytes"] > 1e8 for row in record.measures)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (
            'parts = {{ AP = "adapter(width=2)", BF = "bitfit" }}',
            'parts = {{ AP = "adapter" }}',
            "has 1 parts; give two to four",
        ),
        ("AP = ", '"A+P" = ', "has the name of a method, or a \\+ or >"),
        ('BF = "bitfit"', 'BF = "bitfitt"', "did you mean `bitfit`"),
        ("methods = []", 'methods = ["LoRA"]', "`transfer.methods` names `LoRA`"),
        ("rounds = 2", "rounds = 0", "`rounds = 0`; give 1 or more"),
        ("shots = 3", "shots = 0", "`shots = 0`; give 1 or more"),
        ("train = 12", "train = 0", "`train = 0`; give 1 or more"),
        ("train = 10", "test = 10", "`selection.test = 10`; selection never reads the test split"),
        ("layers = 1", "layers = 0", "`layers = 0`; give 1 or more"),
        ("{{input}} It was {{target}}", "It was", "does not have the form"),
        (
            'title = "few"',
            'type = "few"',
            "`tasks` has .* twice; give each another name or `title`",
        ),
        ("[budget]", '[selection]\npilots = ["fww"]\n[budget]', "did you mean `few`"),
        ("[cost]", '[[methods]]\nname = "S"\nstages = ["T"]\n[cost]', "has the stages `T`"),
        ("[cost]", '[[methods]]\nname = "S"\n[cost]', "neither or both of `spec` and `stages`"),
    ],
)
def test_a_wrong_study_is_named_before_anything_runs(
    done, tmp_path: Path, old: str, new: str, words: str
) -> None:
    assert old in STUDY
    file = tmp_path / "study.toml"
    file.write_text(STUDY.replace(old, new).format(home=done[0]))
    with pytest.raises(dt.DeltuneError, match=words):
        plan_study(file)


def test_a_model_without_a_new_head_is_asked_as_it_is(done, tmp_path: Path) -> None:
    home, folder = done
    plan = read_plan(folder)
    assert plan.transferred and not plan.bare_runs()  # a new head has no answers yet
    headless = dataclasses.replace(plan.models[0], head="embedding")
    (run,) = dataclasses.replace(plan, models=(headless,)).bare_runs()
    told: list[tuple[int, int]] = []
    rows = measure.transfer(run, plan.places, tmp_path, lambda *at: told.append(at))
    assert told == [(number, len(rows)) for number in range(len(rows))]
    assert [row["target"] for row in rows] == [task.name for task in plan.tasks]
    model, tokenizer = dt.load_model(str(home / "model"), "embedding")
    for row, about in zip(rows, run.targets or (), strict=True):
        task = trial.task_of(run, about, plan.places, run.seed)
        objective = objective_for(
            task, model, tokenizer, max_length=run.settings["max_length"],
            template=about.get("template"),
        )  # fmt: skip
        value = dt.evaluate(model, tokenizer, task, "test", objective=objective).value
        assert row["value"] == value and row["source"] == ""


@pytest.mark.parametrize("head", ["mean", "embedding"])
def test_cost_of_a_model_with_another_head_or_none(head: str, done, tmp_path: Path) -> None:
    home, folder = done
    times, first = read_plan(folder).cost_runs()[:2]
    places, model = {times.model["name"]: str(home / "model")}, {**times.model, "head": head}
    spec = {"method": "lora", "spec": dt.parse("lora(rank=2)").to_json()}
    shares: list[float] = []

    def told(done: int, total: int) -> None:
        shares.append(done / total)

    run = dataclasses.replace(times, model=model, targets=[spec])
    timed = measure.cost(run, places, tmp_path, told)
    assert len(timed) == 3 * len(times.settings["lengths"])
    filled = measure.memory(
        dataclasses.replace(first, model=model, spec=spec["spec"]), places, tmp_path, told
    )
    turns = len(times.settings["lengths"]) * (times.settings["rounds"] + 1)
    assert shares[:turns] == [turn / turns for turn in range(turns)]
    assert all(row["peak_bytes"] for row in filled)
