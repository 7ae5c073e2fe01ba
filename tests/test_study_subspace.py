"""Subspaces in a study: found from its deltas, tuned in, surveyed.

Oracles, for a real study of a tiny model: the same spaces, codes and scores by hand in this
process, and relative performance out of the records alone. For what waits for what: a fake worker.
"""

import dataclasses
import itertools
import re
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import deltune as dt
import study_fakes as fakes
import tasks_toys
from deltune.errors import DeltuneError
from deltune.study import pool
from deltune.study.engine import run_study
from deltune.study.page.subspace_scores import Scored, scored, sets, untrained
from deltune.study.plan import Cell, Plan, Run, SubspaceInfo, read_plan, write_plan
from deltune.study.records import Failure, Record, write_record
from deltune.study.report import render, write_report
from deltune.study.resolve import plan_study
from deltune.study.settings import Ablations
from deltune.study.state import State
from deltune.subspace.learned import fit
from deltune.subspace.linear import drawn, principal
from deltune.subspace.settings import FitSettings
from deltune.subspace.store import load
from deltune.subspace.tuning import scores_at, tune
from deltune.tasks.objectives import objective_for
from study_spaces import SPECS, STUDY, learned_by_hand, solutions

pytestmark = pytest.mark.xdist_group("spaces")


def run_of(state: State, kind: str, how: str, **wanted: Any) -> Record:
    space = next(r for r in state.joint.spaces() if r.settings["how"] == how)
    found = {"space": [space], "code": state.joint.codes(space)}
    found["landscape"] = state.joint.landscapes(space)
    (run,) = (r for r in found[kind] if all(getattr(r, n) == v for n, v in wanted.items()))
    return state.records[run.digest()]


def test_a_space_is_what_the_deltas_of_the_seen_tasks_give(space_study, tmp_path: Path) -> None:
    home, state = space_study
    seen = solutions(home, state, "abc", tmp_path)
    by_hand = {
        "principal": principal(seen, 3),
        "random": drawn(seen, 3, seed=5),
    }
    code = torch.tensor([0.5, -1.0, 0.25])
    for how, expected in by_hand.items():
        record = run_of(state, "space", how)
        found = load(home / "out" / "spaces" / record.digest)
        assert found.tasks == ("a", "b", "c")
        for name in SPECS:
            torch.testing.assert_close(found.decode(name, code), expected.decode(name, code))
        for row in record.measures or []:
            if row["which"] == "seen":
                errors = expected.reconstruction(seen)[row["method"]]
                assert row["error"] == pytest.approx(
                    float(errors["abc".index(row["task"])]), abs=1e-5
                )
        rows = {(r["method"], r["task"], r["which"]) for r in record.measures or []}
        where = {"a": "seen", "b": "seen", "c": "seen", "new": "unseen"}
        assert rows == {(m, t, which) for m in SPECS for t, which in where.items()}
    # Three numbers hold three deltas: what is decoded scores as they do.
    for row in run_of(state, "space", "principal").measures or []:
        if row["which"] == "seen":
            assert row["error"] < 1e-3
            own = state.joint.references("tiny", row["task"])[row["method"]][0]
            assert row["value"] == pytest.approx(own)


def test_runs_begin_where_the_space_does(space_study, tmp_path: Path) -> None:
    home, state = space_study
    starts = load(home / "out" / "spaces" / run_of(state, "space", "principal").digest).starts
    task = dt.load_task(home / "task").limited(train=16)
    for name, spec in SPECS.items():
        run = state.finals(Cell("tiny", "a", name))[0]
        model, tokenizer = dt.load_model(str(home / "model"), "embedding", labels=task.labels)
        objective = objective_for(task, model, tokenizer, max_length=128)
        torch.manual_seed(5)
        delta = dt.attach(model, spec)
        assert torch.equal(delta.vector(), starts[name])
        settings = dt.TrainSettings(
            num_train_epochs=1, per_device_train_batch_size=8, learning_rate=1e-2, seed=5,
            allow_unused=True,
        )  # fmt: skip
        dt.train(model, tokenizer, task, delta, settings, objective=objective)
        kept = dt.load(home / "out" / "deltas" / run.digest(), backbone(home))
        torch.testing.assert_close(delta.vector(), kept.vector(), atol=1e-3, rtol=1e-2)


def backbone(home: Path) -> Any:
    return dt.load_model(str(home / "model"), "embedding")[0]


def test_what_codes_are_compared_with_is_the_delta_before_training(space_study) -> None:
    """It is the code zero of every space, and stands first in the table."""
    home, state = space_study
    (run,) = state.joint.starts()
    rows = state.records[run.digest()].measures or []
    assert [(row["task"], row["method"]) for row in rows] == [("new", name) for name in SPECS]
    space = load(home / "out" / "spaces" / run_of(state, "space", "random").digest)
    task = dt.load_task(home / "unseen")
    model, tokenizer = dt.load_model(str(home / "model"), "embedding", labels=task.labels)
    objective = objective_for(task, model, tokenizer, max_length=128)
    expected = scores_at(
        space, model, tokenizer, task, [torch.zeros(3)], space.methods, dt.TrainSettings(),
        objective=objective,
    )  # fmt: skip
    assert {row["method"]: [row["value"]] for row in rows} == expected
    one = untrained(state, run)
    for row in rows:
        own = statistics.mean(state.joint.references("tiny", "new")[row["method"]])
        key = "new", row["method"], row["method"]
        assert one.plain[key] == pytest.approx(row["value"] / own)
    page = render(state)
    assert page.index("before training, tiny<") < page.index("principal, tiny<")


def test_a_code_is_the_best_on_dev_of_its_rates(space_study) -> None:
    home, state = space_study
    record = run_of(state, "code", "principal", method="Bits", seed=6)
    space = load(home / "out" / "spaces" / record.run["settings"]["space"])
    task = dt.load_task(home / "unseen").limited(train=16)
    model, tokenizer = dt.load_model(str(home / "model"), "embedding", labels=task.labels)
    objective = objective_for(task, model, tokenizer, max_length=128)
    tried = {}
    for rate in (1e-2, 1e-1):
        settings = dt.TrainSettings(
            max_steps=4, eval_steps=2, per_device_train_batch_size=8, learning_rate=rate, seed=6
        )
        tried[rate] = tune(space, model, tokenizer, task, "Bits", settings, objective=objective)
    best = max(tried, key=lambda rate: (tried[rate].training.best_dev, -rate))
    rows = record.measures or []
    assert rows[-1]["learning_rate"] == best
    assert rows[-1]["dev"] == tried[best].training.best_dev
    assert rows[-1]["code"] == pytest.approx(tried[best].code.tolist(), abs=1e-5)
    assert {r["decoder"]: r["value"] for r in rows[:-1]} == pytest.approx(tried[best].tests)


def test_a_landscape_is_around_the_codes_of_the_first_seed(space_study) -> None:
    home, state = space_study
    record = run_of(state, "landscape", "random")
    rows = record.measures or []
    codes = {
        name: torch.tensor(
            (run_of(state, "code", "random", method=name, seed=5).measures or [])[-1]["code"]
        )
        for name in SPECS
    }
    assert [r["mark"] for r in rows if "mark" in r] == list(SPECS)
    space = load(home / "out" / "spaces" / record.run["settings"]["space"])
    task = dt.load_task(home / "unseen")
    model, tokenizer = dt.load_model(str(home / "model"), "embedding", labels=task.labels)
    objective = objective_for(task, model, tokenizer, max_length=128)
    ends = [r for r in rows if r.get("path") == "LoRA to Adapter" and r["share"] == 1.0]
    assert [r["method"] for r in ends] == list(SPECS)  # Bits too, whose code is not on the path
    for row in ends:
        expected = scores_at(
            space, model, tokenizer, task, [codes["Adapter"]], [row["method"]],
            dt.TrainSettings(), objective=objective,
        )  # fmt: skip
        assert row["value"] == pytest.approx(expected[row["method"]][0])
    grid = [r for r in rows if "x" in r and "method" in r]
    assert len(grid) == 3 * 9 and len({(r["x"], r["y"]) for r in grid}) == 9


@pytest.mark.parametrize(
    ("which", "tasks", "methods", "chosen"),
    [
        ("space_study", "abc", ("LoRA", "Bits", "Adapter"), {"dimension": 3}),
        ("single_study", "a", ("LoRA", "Adapter"), {"dimension": 4, "weight": 0.1}),
    ],
)
def test_a_learned_space_has_learned_from_the_tasks(
    which: str, tasks: str, methods: tuple[str, ...], chosen: dict[str, Any], tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    """It is the one that the losses of its tasks give, written out; not that of reconstruction
    alone."""
    home, state = request.getfixturevalue(which)
    record = run_of(state, "space", "learned")
    found = load(home / "out" / "spaces" / record.digest)
    seen = solutions(home, state, tasks, tmp_path, methods)
    settings = FitSettings(steps=5, learning_rate=1e-3, **chosen)
    expected, alone = learned_by_hand(home, seen, settings), fit(seen, settings)
    assert found.about.items() >= alone.about.items() and found.about["head"] == "embedding"
    eye = torch.eye(settings.dimension)
    for name in methods:
        there = found.ups[name].project(eye)
        torch.testing.assert_close(there, expected.ups[name].project(eye), atol=1e-6, rtol=0)
        torch.testing.assert_close(found.codes[name], expected.codes[name], atol=1e-6, rtol=1e-4)
        assert (there - alone.ups[name].project(eye)).abs().max() > 1e-4


def test_one_seen_task_is_enough(single_study, tmp_path: Path) -> None:
    """Spaces that are drawn are those by hand; the report says what there is of one task, and the
    same as other code."""
    home, state = single_study
    seen = solutions(home, state, "a", tmp_path, ("LoRA", "Adapter"))
    code = torch.tensor([0.5, -1.0, 0.25, 2.0])
    for how, kind in (("random", "dense"), ("fastfood", "fastfood")):
        record = run_of(state, "space", how)
        found, expected = load(home / "out" / "spaces" / record.digest), drawn(seen, 4, 5, kind)
        assert found.tasks == ("a",) and found.dimension == 4
        for name in seen.methods:
            torch.testing.assert_close(found.decode(name, code), expected.decode(name, code))
        rows = {(r["method"], r["task"], r["which"]) for r in record.measures or []}
        assert rows == {
            (m, t, w) for m in seen.methods for t, w in (("a", "seen"), ("new", "unseen"))
        }
    write_report(home / "out")
    done = fakes.rechecked(home / "out")
    assert done.returncode == 0 and ", 0 differ" in done.stdout, done.stderr
    assert int(done.stdout.split()[0]) >= 90, done.stdout


def test_relative_performance_is_over_the_own_deltas(space_study) -> None:
    _, state = space_study
    for space in state.joint.spaces():
        one = scored(state, space)
        for source in SPECS:
            for decoder in SPECS:
                values = [
                    row["value"]
                    for run in state.joint.codes(space)
                    if run.method == source
                    for row in state.records[run.digest()].measures or []
                    if row.get("decoder") == decoder
                ]
                finals = state.results(Cell("tiny", "new", decoder))
                own = statistics.mean(r.result.test for r in finals if r.result)
                task = state.plan.task("new")
                chance, floor = task.chance, task.floor
                assert len(values) == 2
                key = ("new", source, decoder)
                assert one.plain[key] == pytest.approx(statistics.mean(values) / own)
                above = (statistics.mean(values) - chance) / (own - chance) if own > floor else None
                assert one.above[key] == (above if above is None else pytest.approx(above))
    page = render(state)
    assert "Subspaces" in page and "decoded as Adapter" in page and "principal space of 3" in page


FEW = """
[[models]]
name = "{home}/model"
title = "tiny"
head = "embedding"
[[tasks]]
name = "{home}/task"
title = "a"
shots = 4
[[tasks]]
name = "{home}/b"
title = "b"
shots = 4
type = "news"
[[tasks]]
name = "{home}/unseen"
title = "new"
shots = 4
[study]
name = "A space of prompts"
seeds = [5, 6]
[train]
num_train_epochs = 1
per_device_train_batch_size = 4
allow_unused = true
[[methods]]
name = "Full"
spec = "full"
learning_rate = [1e-3]
[[methods]]
name = "Prompt"
spec = "prompt(tokens=2)"
learning_rate = [1e-1]
[subspace]
unseen = ["new"]
decoded = ["Full"]
tune_seen = true
refine = true
learning_rate = [1e-1]
spaces = {{ learned = [2], random = [2] }}
train = {{ max_steps = 2, eval_steps = 2 }}
[subspace.fit]
steps = 3
weight = 200.0
activation = "none"
distance = "mean"
decoder = "curved"
hidden = 4
[subspace.ablations]
weight = [1.0]
seen = [1]
types = ["news"]
shots = [2]
"""


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, State]:
    """A few-shot study of prompts, with full fine-tuning decoding their codes."""
    home = tasks_toys.home(tmp_path_factory.mktemp("few"))
    tasks_toys.write_task(home / "b", ("no", "yes"))
    tasks_toys.write_task(home / "unseen", ("is", "was"))
    (home / "study.toml").write_text(FEW.format(home=home))
    status = run_study(plan_study(home / "study.toml"), home / "out", workers=2)
    state = State(read_plan(home / "out"), home / "out")
    assert not state.failures(), state.failures()[0].failure
    codes, others = 3 * 2, 4 * (1 + 2 * 2)  # tasks and seeds; spaces, methods and seeds
    few = 2  # the seen tasks again, with fewer examples
    assert (status.total, status.finished) == (2 * 6 + 1 + 2 + 3 * codes + others + few,) * 2
    return home, state


def test_a_method_without_solutions_decodes_and_is_decoded(few) -> None:
    home, state = few
    spaces = {run.settings["how"]: run for run in state.joint.spaces()}
    assert "decoded" not in spaces["random"].settings
    space = load(home / "out" / "spaces" / spaces["learned"].digest())
    assert space.methods == ("Prompt", "Full") and set(space.codes) == {"Prompt"}
    model, tokenizer = dt.load_model(str(home / "model"), "embedding")
    assert len(space.starts["Full"]) == sum(p.numel() for p in model.parameters())
    for run in state.joint.codes(spaces["learned"]):
        rows = state.records[run.digest()].measures or []
        assert [row["decoder"] for row in rows if "decoder" in row] == ["Prompt", "Full"]
    run = next(r for r in state.joint.codes(spaces["learned"]) if r.method == "Full")
    task = dt.load_task(home / run.task["name"].replace("new", "unseen")).few_shot(4, run.seed)
    objective = objective_for(task, model, tokenizer, max_length=run.settings["max_length"])
    rows = state.records[run.digest()].measures or []
    code = next(row["code"] for row in rows if "code" in row)
    again = scores_at(
        space, model, tokenizer, task, [torch.tensor(code)], space.methods, dt.TrainSettings(),
        objective=objective,
    )  # fmt: skip
    assert again == {row["decoder"]: [row["value"]] for row in rows if "decoder" in row}


def test_codes_and_deltas_from_them_on_seen_and_unseen_tasks(few) -> None:
    """The five sets of intrinsic prompt tuning, and prompt tuning begun in the space."""
    _, state = few
    space = next(run for run in state.joint.spaces() if run.settings["how"] == "learned")
    rows = {(row["method"], row["set"]): row for row in sets(state, space)}
    assert {which for method, which in rows if method == "Prompt"} == {
        "seen, decoded", "unseen, decoded", "seen, trained", "seen, other examples, trained",
        "unseen, trained",
    }  # fmt: skip
    parts, refined, full = [], [], []
    for name in ("a", "b"):
        (run,) = (
            r
            for r in state.joint.codes(space)
            if (r.method, r.seed, r.task["name"]) == ("Prompt", 6, name)
        )
        measures = state.records[run.digest()].measures or []
        own, whole = (
            statistics.mean(r.result.test for r in state.results(Cell("tiny", name, m)) if r.result)
            for m in ("Prompt", "Full")
        )
        value = next(row["value"] for row in measures if row.get("decoder") == "Prompt")
        again = next(row["refined"] for row in measures if "refined" in row)
        parts.append(value / own)
        full.append(value / whole)
        refined.append(again / own)
    row = rows["Prompt", "seen, other examples, trained"]
    assert row["own"] == pytest.approx(statistics.mean(parts))
    assert row["full"] == pytest.approx(statistics.mean(full))
    assert row["refined"] == pytest.approx(statistics.mean(refined))
    page = render(state)
    assert "Seen and unseen tasks" in page and "seen, other examples, trained" in page


@pytest.mark.parametrize(("which", "least"), [("space_study", 150), ("few", 100)])
def test_other_code_finds_the_same_numbers(
    which: str, least: int, request: pytest.FixtureRequest
) -> None:
    """The program that rechecks kept reports reads the records with nothing but Python."""
    home, _ = request.getfixturevalue(which)
    write_report(home / "out")
    done = fakes.rechecked(home / "out")
    assert done.returncode == 0 and ", 0 differ" in done.stdout, done.stderr
    assert int(done.stdout.split()[0]) >= least, done.stdout


def test_a_refined_delta_begins_at_what_its_code_means(few) -> None:
    home, state = few
    space = next(run for run in state.joint.spaces() if run.settings["how"] == "learned")
    found = load(home / "out" / "spaces" / space.digest())
    run = next(
        r
        for r in state.joint.codes(space)
        if (r.method, r.seed, r.task["name"]) == ("Prompt", 5, "new")
    )
    own = next(r for r in state.finals(Cell("tiny", "new", "Prompt")) if r.seed == 5)
    assert run.settings["refine"] == own.settings
    rows = state.records[run.digest()].measures or []
    code = torch.tensor(next(row["code"] for row in rows if "code" in row))
    model, tokenizer = dt.load_model(str(home / "model"), "embedding", seed=5)
    task = dt.load_task(home / "unseen").few_shot(4, 5)
    objective = objective_for(task, model, tokenizer, max_length=own.settings["max_length"])
    delta = found.attach(model, "Prompt")
    delta.load_vector(found.decode("Prompt", code))
    known = {n: v for n, v in own.settings.items() if n != "train_metric"}
    dt.train(model, tokenizer, task, delta, dt.TrainSettings.from_json(known), objective=objective)
    value = dt.evaluate(model, tokenizer, task, "test", objective=objective).value
    assert next(row["refined"] for row in rows if "refined" in row) == value


@pytest.fixture
def _fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "COMMAND", [sys.executable, fakes.__file__])


def plan_of(*methods: str) -> Plan:
    made = [
        fakes.make_method(name, spec) for name, spec in zip(methods, SPECS.values(), strict=False)
    ]
    plan = fakes.make_plan(made, (0, 1))
    toy = plan.tasks[0]
    tasks = tuple(dataclasses.replace(toy, name=name) for name in ("a", "b", "new"))
    sub = SubspaceInfo(("new",), methods, {"random": [1, 2]}, (1e-2,), made[0].settings, {})
    return dataclasses.replace(plan, tasks=tasks, subspace=sub)


@pytest.mark.usefixtures("_fake")
def test_what_can_never_start_is_counted(tmp_path: Path) -> None:
    status = run_study(plan_of("B", "Fails"), tmp_path, workers=2)
    assert (status.total, status.failed) == (4 + 4 + 1 + 2 * (1 + 4), 4)
    assert (status.blocked, status.left, status.done) == (10, 0, True)


@pytest.mark.usefixtures("_fake")
def test_what_can_never_start_is_counted_with_fewer_examples_too(tmp_path: Path) -> None:
    """Runs on so few examples fail by themselves; spaces wait for those of their own kind."""
    plan = plan_of("B", "Fails")
    assert plan.subspace is not None
    sub = dataclasses.replace(
        plan.subspace, spaces={"learned": [2]}, ablations=Ablations(shots=(2,), types=("other",))
    )
    status = run_study(dataclasses.replace(plan, subspace=sub), tmp_path, workers=2)
    assert (status.total, status.failed) == (4 + 4 + 1 + 2 * 2 + 3 * (1 + 4), 4 + 2)
    assert (status.blocked, status.left, status.done) == (3 * (1 + 4), 0, True)


@pytest.mark.usefixtures("_fake")
def test_a_method_without_a_rate_that_works_blocks_the_spaces(tmp_path: Path) -> None:
    plan = plan_of("B", "Fails")
    bad = dataclasses.replace(plan.methods[1], learning_rate=(1e-3, 1e-2))
    plan = dataclasses.replace(plan, methods=(plan.methods[0], bad))
    status = run_study(plan, tmp_path, workers=2)
    assert (status.failed, status.finished) == (6, 5)  # both rates on three tasks; B's finals
    assert (status.blocked, status.left, status.done) == (4 + 10, 0, True)


def decoding_plan(*rates: float, refine: bool = False) -> Plan:
    """Two methods of a learned space, and one that only decodes its codes."""
    plan = plan_of("B", "C")
    assert plan.subspace is not None
    sub = dataclasses.replace(
        plan.subspace, spaces={"learned": [2]}, landscapes=("new",), decoded=("Full",),
        refine=refine,
    )  # fmt: skip
    every = (*plan.methods, fakes.make_method("Full", "full", rates))
    return dataclasses.replace(plan, subspace=sub, methods=every)


@pytest.mark.parametrize("works", [True, False])
def test_a_refined_code_waits_for_the_rate_of_its_method(tmp_path: Path, works: bool) -> None:
    """Of a method that only decodes it may not be known yet when the space is there."""
    state = State(decoding_plan(1e-3, 1e-2, refine=True), tmp_path)
    late: list[Run] = []
    started: list[Run] = []

    def answer(run: Run, fails: bool = False) -> None:
        started.append(run)
        result = fakes.make_result(0.8) if run.kind in ("selection", "final") else None
        failure = Failure("TrainError", "the loss is NaN") if fails else None
        rows: list[dict[str, Any]] = [{"code": [0.0, 1.0]}]
        state.add(fakes.make_record(run, None if fails else result, failure, rows))

    while run := state.next_run():
        if (run.kind, run.method, run.task["name"]) == ("selection", "Full", "new"):
            late.append(run)
            state.running[run.digest()] = 0.5
            continue
        answer(run)
    codes = [(run.method, run.seed) for run in started if run.kind == "code"]
    assert codes == [("B", 0), ("C", 0), ("B", 1), ("C", 1)]
    for run in late:
        answer(run, fails=not works)
    while run := state.next_run():
        answer(run)
    full = [run for run in started if (run.method, run.task["name"]) == ("Full", "new")]
    owns = {run.seed: run.settings for run in full if run.kind == "final"}
    refined = {run.seed: run.settings["refine"] for run in full if run.kind == "code"}
    assert refined == owns
    assert set(refined) == ({0, 1} if works else set())
    status = state.status()
    assert (status.left, status.done) == (0, True)
    assert status.blocked == (0 if works else 2 + 2 + 1)  # its finals, codes, and the survey


@pytest.mark.parametrize("fate", ["blocked", "failed", "finished"])
def test_a_survey_waits_for_the_first_seed_of_a_method_that_only_decodes(
    tmp_path: Path, fate: str
) -> None:
    """Its delta of the task is no part of the space, so it may be missing; that of another seed is
    not what the others are measured by."""
    rates = (1e-3, 1e-2) if fate == "blocked" else (1e-3,)
    state = State(decoding_plan(*rates), tmp_path)
    late: list[Run] = []

    def answer(run: Run) -> None:
        own = run.method == "Full" and run.kind != "code"
        fails = own and (run.kind, fate) in (("selection", "blocked"), ("final", "failed"))
        fails = fails and (run.kind == "selection" or run.seed == 0)
        trained = run.kind in ("selection", "final") and not fails
        result = fakes.make_result(0.8 if run.seed == 0 else 0.4) if trained else None
        failure = Failure("TrainError", "the loss is NaN") if fails else None
        record = fakes.make_record(run, result, failure, [{"code": [0.0, 1.0]}])
        state.add(record)

    while run := state.next_run():
        cell = run.kind, run.method, run.task["name"], run.seed
        if cell == ("final", "Full", "new", 0):
            late.append(run)
            state.running[run.digest()] = 0.5
            continue
        assert run.kind != "landscape"
        answer(run)
    for run in late:
        answer(run)
    surveys = [run for run in iter(state.next_run, None) if answer(run) is None]
    assert [run.kind for run in surveys] == ["landscape"] * (fate == "finished")
    for run in surveys:
        assert [t["own"] for t in run.targets or ()] == [0.8] * 3
    status = state.status()
    assert (status.left, status.done) == (0, True)
    assert status.blocked == {"blocked": 2 + 2 + 1, "failed": 1, "finished": 0}[fate]


def test_each_waits_for_what_it_needs(tmp_path: Path) -> None:
    plan = plan_of("B", "C")
    state, started = State(plan, tmp_path), []
    while run := state.next_run():
        started.append(run)
        rows: list[dict[str, Any]] | None = [{"decoder": "B", "value": 0.5}, {"code": [0.0]}]
        result = fakes.make_result(None) if run.kind == "final" else None
        record = fakes.make_record(run, result)
        state.add(dataclasses.replace(record, status="finished", measures=rows))
    kinds = [run.kind for run in started]
    assert kinds == ["final"] * 8 + ["start"] + ["space"] * 2 + ["code"] * 8
    assert state.status().left == 0
    needed = {place for run in started for place in run.needs}
    spaces = [run for run in started if run.kind == "space"]
    assert {f"spaces/{run.digest()}" for run in spaces} <= needed
    for run in spaces:
        deltas = {f"deltas/{one.digest()}" for one in started[:8] if one.seed == 0}
        assert set(run.needs) == deltas and all(plan.keeps(one) for one in kept(started))


def test_the_time_left_is_that_of_runs_of_the_same_kind(tmp_path: Path) -> None:
    """Training takes 100 s, a space 1000, a code 7: a method's codes are none of its trainings."""
    state = State(plan_of("B", "C"), tmp_path)
    took = {"final": 100.0, "start": 3.0, "space": 1000.0, "code": 7.0}
    codes = 8
    while run := state.next_run():
        rows: list[dict[str, Any]] | None = [{"decoder": "B", "value": 0.5}, {"code": [0.0]}]
        result = fakes.make_result(None) if run.kind == "final" else None
        record = fakes.make_record(run, result)
        state.add(
            dataclasses.replace(record, status="finished", measures=rows, seconds=took[run.kind])
        )
        if run.kind == "code":
            codes -= 1
            assert state.status(workers=2).seconds_left == pytest.approx(7 * codes / 2)
    assert codes == 0


LETTERS = ("B", "C", "D")
OTHER = "other, of 3: big"
"""A name with what the report puts between the parts of a title."""


def made_up(run: Run, dimension: float, task: str, source: str, decoder: str) -> float:
    """The metric of a code. Tuned ones of d numbers have 0.5 + 0.06 d in the mean over tasks and
    seeds, and 0.06 more with the other model; seeds 0 and 1 differ by 0.06 with B, by -0.024 with
    C and not with D."""
    other, away = run.model["name"] == OTHER, 0.03 if task == "newer" else -0.03
    lost = 0.006 * (1 + 3 * LETTERS.index(source) + LETTERS.index(decoder))
    away += {"B": 0.03, "C": -0.012, "D": 0.0}[source] * (1 if run.seed else -1)
    value = 0.5 + 0.06 * (dimension + other) + away
    return value if source == decoder else value - lost


def surveyed(run: Run) -> list[dict[str, Any]]:
    """Measures of a landscape, of which no two are the same; those of the first model are as
    records once were, with paths that only the methods of their ends decode."""
    names = [target["method"] for target in run.targets or ()]
    known = run.model["name"] == OTHER
    far = 0.01 * known + 0.02 * len(names)
    rows: list[dict[str, Any]] = [{"mark": n, "x": float(i), "y": 0.5} for i, n in enumerate(names)]
    for at, name in enumerate(names):
        for x, y in itertools.product((0.0, 1.0), repeat=2):
            value = 0.7 + 0.01 * at + far * x + 0.001 * y
            rows.append({"method": name, "x": x, "y": y, "value": value})
    for place, (one, two) in enumerate(itertools.combinations(names, 2)):
        for name, share in itertools.product(names if known else (one, two), (0.0, 1.0)):
            value = 0.6 + far * share + 0.01 * place + 0.001 * names.index(name)
            rows.append({"path": f"{one} to {two}", "method": name, "share": share, "value": value})
    return rows


def answered(folder: Path) -> State:
    """A study of two models, in a folder, with own deltas at 0.8 and made-up codes."""
    plan = plan_of(*LETTERS)
    (model,), toy = plan.models, plan.tasks[0]
    assert plan.subspace is not None
    sub = dataclasses.replace(
        plan.subspace, unseen=("new", "newer"), landscapes=("new",), fit={"weight": 10.0},
        spaces={"random": [1, 2], "learned": [3, 2]}, ablations=Ablations((0.5,), (1,)),
    )  # fmt: skip
    plan = dataclasses.replace(
        plan,
        models=(model, dataclasses.replace(model, name=OTHER)),
        tasks=tuple(
            dataclasses.replace(toy, name=name, title=f"{name}: toy", chance=0.5, test=4000)
            for name in ("a", "b", "new", "newer")
        ),
        subspace=sub,
    )
    write_plan(plan, folder)
    lengths: dict[str, float] = {}
    state = State(plan, folder)
    while run := state.next_run():
        rows: list[dict[str, Any]] | None = None
        if run.kind == "space":
            d = run.settings["dimension"]
            lengths[run.digest()] = d + 0.25 * ("(" in run.method) + 0.5 * ("(seen" in run.method)
            off = 0.01 * (d + (run.model["name"] == OTHER))
            known = dict.fromkeys(target["task"]["name"] for target in run.targets or ())
            rows = [{"task": t, "method": m, "which": "unseen" if "new" in t else "seen",
                     "error": 0.5 - off, "bound": 0.4 - off, "value": 0.7 + off}
                    for t in known for m in LETTERS]  # fmt: skip
        elif run.kind == "start":
            begun = 0.55 if run.model["name"] == OTHER else 0.5
            rows = [{"task": t, "method": m, "value": begun} for t in sub.unseen for m in LETTERS]
        elif run.kind == "code":
            key = lengths[run.settings["space"]], run.task["name"], run.method
            rows = [{"decoder": m, "value": made_up(run, *key, m)} for m in LETTERS]
            rows.append({"code": [rows[0]["value"], rows[-1]["value"] - 0.5]})
        elif run.kind == "landscape":
            rows = surveyed(run)
        result = fakes.make_result(0.8) if run.kind == "final" else None
        record = fakes.make_record(run, result)
        record = dataclasses.replace(record, status="finished", measures=rows)
        write_record(folder, record)
        state.add(record)
    return state


def test_each_model_has_its_own_curves_against_dimension(tmp_path: Path) -> None:
    """Own deltas have 0.8; codes of d numbers are 0.2 d of the way from guessing two labels with
    one model, 0.2 + 0.2 d with the other. The means of the two seeds over the methods are 0.012
    apart, 0.04 of the way."""
    state = answered(tmp_path)
    page = render(state)
    text = " ".join(re.sub(r"<[^>]+>", " ", page).split())
    away = round(statistics.stdev([0.0, 0.04]), 4)
    for name, data in (
        ("tiny", f"0.2 {away} random 2 0.4 {away} "), (OTHER, f"0.4 {away} random 2 0.6 {away} ")
    ):  # fmt: skip
        shown = text.split(f"Codes against dimension, {name} ")[1].split("Data of this figure")[1]
        assert shown.startswith(f" space numbers relative deviation random 1 {data}"), name
    figure = page.split("<h3>Codes against dimension, tiny</h3>")[1].split("</figure>")[0]
    assert "Bars: standard deviation over the seeds of the codes" in figure
    lengths = [
        abs(float(y1) - float(y2))
        for y1, y2 in re.findall(
            r'class="bar[^"]*" x1="[^"]*" y1="([^"]*)" .*?y2="([^"]*)"', figure
        )
    ]
    heights = dict(re.findall(r'cy="([^"]*)" r="2.6"><title>random: (0.[24])00', figure))
    (high, _), (low, _) = sorted(heights.items(), key=lambda one: one[1], reverse=True)
    scale = (float(low) - float(high)) / 0.2  # pixels
    # Random 1 and 2, learned 2 and 3; none that is learned otherwise.
    assert lengths == pytest.approx([2 * away * scale] * 4, abs=0.2)


def test_the_deviation_is_over_the_seeds_that_have_everything() -> None:
    """Seed 2 has one task alone, on which it is far off."""
    seeds = {
        ("a", "X", "X"): {0: 0.1, 1: 0.3, 2: 9.0}, ("b", "X", "X"): {0: 0.7, 1: 0.9},
        ("a", "X", "Y"): {0: 0.0, 1: 0.0, 2: 0.6},
    }  # fmt: skip
    one = Scored({}, {}, seeds)
    same = one.deviation(lambda source, decoder: source == decoder)
    assert same == pytest.approx(statistics.stdev([0.4, 0.6]))
    other = one.deviation(lambda source, decoder: source != decoder)
    assert other == pytest.approx(statistics.stdev([0.0, 0.0, 0.6]))
    alone = Scored({}, {}, {("a", "X", "X"): {0: 0.1}})
    assert (
        alone.deviation(lambda *_: True) is None and Scored({}, {}).deviation(lambda *_: 1) is None
    )


def test_transfer_is_averaged_by_direction(tmp_path: Path) -> None:
    """In the learned space of 2 of the second model codes have 0.68 in the mean over tasks, less
    what a direction loses; and own deltas 0.8."""
    page = render(answered(tmp_path))
    table = page.split("<h3>Transfer by direction</h3>")[1].split("<h3>")[0]
    for title, chance in (("Relative", 0.0), ("Above chance", 0.5)):
        part = table.split(f"<h4>{title}</h4>")[1].split("<h4>")[0]
        rows = [re.findall(r'data-v="([^"]*)"', line) for line in part.split("<tr>")]
        shown = {row[2]: row[3:] for row in rows if row[:2] == [f"learned, {OTHER}", "2"]}
        assert list(shown) == list(LETTERS)
        for i, values in enumerate(shown.values()):
            lost = [0.0 if i == j else 0.006 * (1 + 3 * i + j) for j in range(3)]
            right = [(0.68 - one - chance) / (0.8 - chance) for one in lost]
            assert list(map(float, values)) == pytest.approx(right)
    fold = page.split(f"learned space of 2, {OTHER}: every task")[1]
    (mean, *_) = re.findall(r'data-v="Mean over tasks".*?</tr>', fold)
    values = re.findall(r'data-v="([^"]*)"', mean)[1:]
    assert list(map(float, values[:3])) == pytest.approx([0.68 / 0.8] * 3)
    assert float(values[3]) == pytest.approx((0.68 - 0.006 * 2) / 0.8)  # B to C


def test_spaces_that_differ_in_one_thing(tmp_path: Path) -> None:
    """In the weight or in the tasks that they are found from; those of a study without them stay
    the runs that they were, and nothing but codes of unseen tasks is trained in the others."""
    state = answered(tmp_path)
    plan, status = state.plan, state.status()
    assert plan.subspace is not None and (status.left, status.done) == (0, True)
    assert status.total == status.finished == len(list((tmp_path / "runs").iterdir()))
    spaces = [run for run in state.joint.spaces() if run.model["name"] == "tiny"]
    *plain, weighed, few = spaces
    without = dataclasses.replace(plan.subspace, ablations=Ablations())
    before = State(dataclasses.replace(plan, subspace=without), tmp_path)
    kept = [run for run in before.joint.spaces() if run.model["name"] == "tiny"]
    assert [run.digest() for run in plain] == [run.digest() for run in kept]
    assert [run.settings["dimension"] for run in plain] == [1, 2, 3, 2]
    usual = plain[-1]
    assert weighed.settings == {**usual.settings, "fit": {"weight": 0.5}}
    assert (weighed.targets, few.settings) == (usual.targets, usual.settings)
    seen = {(t["task"]["name"], t["seen"]) for t in few.targets or ()}
    assert seen == {("a", True), ("new", False), ("newer", False)}
    for run in (weighed, few):
        assert {one.task["name"] for one in state.joint.codes(run)} == {"new", "newer"}
        assert not state.joint.landscapes(run) and state.joint.landscapes(usual)


def test_a_space_of_fewer_tasks_is_found_from_the_first(few) -> None:
    home, state = few
    *_, weighed, one, _, _ = state.joint.spaces()
    names = [state.joint.called(run) for run in (weighed, one)]
    assert names == ["learned (weight 1)", "learned (seen 1)"]
    found = [load(home / "out" / "spaces" / run.digest()) for run in (weighed, one)]
    assert [space.about["weight"] for space in found] == [1.0, 200.0]
    assert [space.tasks for space in found] == [("a", "b"), ("a",)]
    rows = state.records[one.digest()].measures or []
    assert {(row["task"], row["which"]) for row in rows} == {("a", "seen"), ("new", "unseen")}


def test_a_space_of_one_type_of_tasks_and_one_of_fewer_examples(few) -> None:
    home, state = few
    usual, *_, typed, short = state.joint.spaces()
    names = [state.joint.called(run) for run in (typed, short)]
    assert names == ["learned (types news)", "learned (shots 2)"]
    found = [load(home / "out" / "spaces" / run.digest()) for run in (usual, typed, short)]
    assert [space.tasks for space in found] == [("a", "b"), ("b",), ("a", "b")]
    rows = state.records[typed.digest()].measures or []
    assert {(row["task"], row["which"]) for row in rows} == {("b", "seen"), ("new", "unseen")}
    ends: dict[int, list[torch.Tensor]] = {}
    for run in (usual, short):
        for target in run.targets or ():
            record = state.records[target["final"]]
            few_, unseen = run is short and target["seen"], not target["seen"]
            assert record.spec.task["shots"] == target["task"]["shots"] == (2 if few_ else 4)
            assert record.result is not None and record.result.steps == (1 if few_ else 2)
            folder = home / "out" / "deltas" / target["final"]
            if not unseen:
                vector = torch.cat(
                    [t.flatten() for t in load_file(folder / "delta.safetensors").values()]
                )
                ends.setdefault(2 if few_ else 4, []).append(vector)
    assert not any(torch.equal(a, b) for a, b in zip(ends[2], ends[4], strict=True))
    assert not torch.equal(found[0].codes["Prompt"], found[2].codes["Prompt"])


def test_what_a_space_keeps_is_of_the_deltas_that_it_is_made_of(tmp_path: Path) -> None:
    """Deltas of few examples have 0.6, others 0.8; guessing has 0.5, decoded codes 0.58."""
    plan, toy = plan_of("B", "C"), dataclasses.replace(plan_of("B").tasks[0], chance=0.5, test=4000)
    assert plan.subspace is not None
    sub = dataclasses.replace(
        plan.subspace, spaces={"learned": [2]}, ablations=Ablations(shots=(2,))
    )
    tasks = tuple(dataclasses.replace(toy, name=task, title=task) for task in ("a", "b", "new"))
    plan = dataclasses.replace(plan, tasks=tasks, subspace=sub)
    write_plan(plan, tmp_path)
    state = State(plan, tmp_path)
    while run := state.next_run():
        test = 0.6 if run.task.get("shots") else 0.8
        rows = [{"task": t, "method": m, "which": "unseen" if t == "new" else "seen", "value": 0.58,
                 "error": 0.5, "bound": 0.4} for t in ("a", "b", "new") for m in "BC"]  # fmt: skip
        result = fakes.make_result(test) if run.kind == "final" else None
        record = fakes.make_record(run, result, None, rows if run.kind == "space" else [])
        write_record(tmp_path, record)
        state.add(record)
    page = write_report(tmp_path).read_text()
    table = page[page.index("<h3>Reconstruction<") :]
    found = [re.findall(r'data-v="([^"]*)"', row) for row in table.split("<tr>")[2:6]]
    shown = {(row[0], row[2]): tuple(float(value) for value in row[-2:]) for row in found}
    usual, short = (0.08 / 0.3, 0.08 / 0.3), (0.08 / 0.1, 0.08 / 0.3)
    assert shown == {
        (f"{name}, tiny", method): pytest.approx(kept)
        for name, kept in (("learned", usual), ("learned (shots 2)", short))
        for method in "BC"
    }
    assert fakes.rechecked(tmp_path).returncode == 0


FIGURE = "Data of this figure<"
WRONG = {
    "Codes against dimension, other, of 3: big: random, 2.0": (
        "<h3>Codes against dimension, other", FIGURE, ">random<", ">2<",
    ),
    "Codes against dimension, tiny: learned, 2.0, deviation": (
        "<h3>Codes against dimension, tiny", FIGURE, ">learned<", ">2<", "data-v=",
    ),
    "Transfer against dimension, tiny: random, 2.0": (
        "<h3>Transfer against dimension, tiny", FIGURE, ">random<", ">2<",
    ),
    "random, other, of 3: big, 1: B": (">random, other, of 3: big<", ">1<"),
    "learned space of 2, other, of 3: big: every task, Relative, new: toy: B": (
        ">learned space of 2, other, of 3: big: every task<", ">new: toy<",
    ),
    "before training, other, of 3: big: every task, Relative, new: toy: B": (
        ">before training, other, of 3: big: every task<", ">new: toy<",
    ),
    "before training, tiny: every task, Relative, Mean over tasks: B": (
        ">before training, tiny: every task<", ">Mean over tasks<",
    ),
    "Transfer by direction, Above chance, random, other, of 3: big, 1: D as B": (
        "<h3>Transfer by direction<", ">Above chance<", ">random, other, of 3: big<", ">1<", ">D<",
    ),
    "learned (seen 1), tiny, 2: mean": (
        "<h3>Codes and transfer<", ">learned (seen 1), tiny<", *["data-v="] * 4,
    ),
    "learned (weight 0.5) space of 2, tiny: every task, Relative, newer: toy: B": (
        ">learned (weight 0.5) space of 2, tiny: every task<", ">newer: toy<",
    ),
    "random, tiny, 2, C: bound": ("<h3>Reconstruction<", ">random, tiny<", ">2<", ">C<"),
    "Likeness of codes, learned (seen 1), other, of 3: big, 2: other types": (
        "<h3>Likeness of codes<", ">learned (seen 1), other, of 3: big<", ">2<", *["data-v="] * 2,
    ),
    "Cosine of codes: learned space of 2, other, of 3: big, new: toy and newer: toy": (
        "<h3>Cosine of codes: learned space of 2, other, of 3: big<", FIGURE, ">newer: toy<",
    ),
    "new: toy: random space of 2, other, of 3: big, point 8 decoded as D": (
        "<h3>new: toy: random space of 2, other, of 3: big<", ">D</th>", ">0<", ">0<",
    ),
    "new: toy: learned space of 2, other, of 3: big: B to D, 1.0 decoded as C": (
        "<h3>new: toy: learned space of 2, other, of 3: big: B to D<", ">C</th>", ">1<",
    ),
    "new: toy: learned space of 2, tiny: B to D, 1.0 decoded as D": (
        "<h3>new: toy: learned space of 2, tiny: B to D<", ">D</th>", ">1<",
    ),
}  # fmt: skip
"""What the program calls a number of the page, and what stands before it, one after the other."""


def test_other_code_finds_the_numbers_of_each_model(tmp_path: Path) -> None:
    """All of them, and each that is changed on the page, though the names hold `, ` and `: `."""
    answered(tmp_path)
    page = write_report(tmp_path)
    done = fakes.rechecked(tmp_path)
    assert done.returncode == 0 and ", 0 differ" in done.stdout, done.stderr
    text = page.read_text()
    for before in WRONG.values():
        at = 0
        for words in (*before, 'data-v="'):
            at = text.index(words, at) + len(words)
        text = text[:at] + "0.123" + text[text.index('"', at) :]
    page.write_text(text)
    done = fakes.rechecked(tmp_path)
    named = [line.partition(": 0.123 in the report")[0] for line in done.stderr.splitlines()]
    assert done.returncode == 1 and sorted(named) == sorted(f"Subspaces, {at}" for at in WRONG)


def kept(started: list[Run]) -> list[Run]:
    return [run for run in started if run.kind == "final" and run.seed == 0]


STAGED = """
[[methods]]
name = "Two"
stages = ["LoRA", "Bits"]
"""
PARTS = """
[combination]
parts = {{ AP = "adapter(width=2)", BF = "bitfit" }}
learning_rate = [1e-3]
orders = true
"""
FULL = """
[[methods]]
name = "Full"
spec = "full"
learning_rate = [1e-3]
"""


@pytest.mark.parametrize(
    ("methods", "more", "shared"),
    [
        ("", STAGED + FULL, ("LoRA", "Bits", "Adapter")),
        ("", PARTS, ("AP", "BF", "AP+BF", "LoRA", "Bits", "Adapter")),
        ('methods = ["BF", "LoRA", "AP+BF"]', PARTS, ("BF", "LoRA", "AP+BF")),
    ],
)
def test_the_methods_of_a_space_are_single_ones(
    space_study, tmp_path: Path, methods: str, more: str, shared: tuple[str, ...]
) -> None:
    """Parts of a combination are methods; what is trained in stages has no delta of its own."""
    text = STUDY.replace("points = 3", "points = 3\n" + methods) + more
    file = tmp_path / "study.toml"
    file.write_text(text.format(home=space_study[0]))
    sub = plan_study(file).subspace
    assert sub is not None and sub.methods == shared


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('unseen = ["new"]', 'unseen = ["neww"]', "did you mean `new`"),
        ('unseen = ["new"]', "unseen = []", "has 0 unseen tasks"),
        ('unseen = ["new"]', 'unseen = ["new", "a", "b", "c"]', "0 others to find"),
        (
            'unseen = ["new"]',
            'unseen = ["new", "b", "c"]',
            r"\[3\]` with 1 tasks to find .*\(`a`\)",
        ),
        ('landscapes = ["new"]', 'landscapes = ["a"]', "`subspace.landscapes` names `a`"),
        ("principal = [3]", "principle = [3]", "did you mean `principal`"),
        ("principal = [3]", "principal = [1, 9]", r"`principal = \[1, 9\]` with 3 tasks"),
        ("principal = [3]", "principal = [0]", r"`principal = \[0\]`; give the lengths"),
        ("principal = [3]", "principal = 3", "`principal = 3`; give the lengths"),
        ("[1e-2, 1e-1]", "[]", r"learning_rate = \[\]"),
        ("steps = 5", "stepps = 5", "did you mean `steps`"),
        ("steps = 5", "dimension = 5", "it stands in `spaces`"),
        ("steps = 5", "steps = 0", "`steps` is 0"),
        ("points = 3", 'decoded = ["LoRa"]', "did you mean `LoRA`"),
        ("points = 3", 'methods = ["LoRA"]\ndecoded = ["LoRA"]', "`LoRA` stands in `methods` and"),
        (", learned = [3] }}", ' }}\ndecoded = ["LoRA"]', "only `learned` spaces know `LoRA`"),
        ("points = 3", "ablations = {{ seen = [3] }}", "`ablations.seen` names 3; give 1 to 2"),
        ("points = 3", "ablations = {{ seen = [2, 2] }}", "a value twice"),
        ("points = 3", "ablations = {{ shots = [0] }}", "`ablations.shots` names 0; give 1"),
        ("points = 3", 'ablations = {{ types = ["othr"] }}', "did you mean `other`"),
        (
            "points = 3",
            "ablations = {{ weight = [10] }}",
            "names 10, which the learned spaces have",
        ),
        ("points = 3", "ablations = {{ weight = [-1] }}", "`weight` is -1"),
        (", learned = [3] }}", " }}\nablations = {{ seen = [1] }}", "is of `learned` spaces and"),
        ("points = 3", "points = 1", "points = 1; a survey has 2 or more"),
        ('"embedding"', '"classification"', "has a head for each task"),
        ('unseen = ["new"]', 'unseen = ["new", "new"]', "`unseen = .*` has a name twice"),
        ("points = 3", 'methods = ["LoRA", "LoRA"]', "`methods = .*` has a name twice"),
        ("points = 3", 'methods = ["LoRA", "Bits"]', "with 2 methods; a plane lies on three"),
        ("random = [3]", "random = [1]", r"`random = \[1\]` with 3 methods; a plane lies"),
        ("points = 3", 'methods = ["LoRA", "Two"]' + STAGED, "names `Two`; expected one of `LoRA`"),
        (STUDY[STUDY.index("[[methods]]") : STUDY.index("[subspace]")], FULL, "is a baseline or"),
    ],
)
def test_a_wrong_table_is_named_before_anything_runs(
    space_study, tmp_path: Path, old: str, new: str, words: str
) -> None:
    assert old in STUDY
    file = tmp_path / "study.toml"
    file.write_text(STUDY.replace(old, new).format(home=space_study[0]))
    with pytest.raises(DeltuneError, match=words):
        plan_study(file)
