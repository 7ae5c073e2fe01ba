"""SQL over records and their exports, against the records read in plain Python."""

import json
from pathlib import Path

import pyarrow.parquet
import pytest

from deltune.cli.app import run
from deltune.errors import StudyError
from deltune.study.query import export, query
from deltune.study.records import Failure, write_record
from study_fakes import make_method, make_plan, make_record, make_result


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two methods with two seeds each, a selection run, and a failure."""
    methods = [make_method("LoRA", "lora", (1e-3, 1e-2)), make_method("Full", "full")]
    plan = make_plan(methods)
    for at, cell in enumerate(plan.cells()):
        for seed, one in enumerate(plan.final_runs(cell, 1e-3)):
            failed = (at, seed) == (1, 1)
            result = None if failed else make_result(0.7 + 0.1 * at + 0.01 * seed)
            failure = Failure("TrainError", "the loss is NaN") if failed else None
            write_record(tmp_path, make_record(one, result, failure))
        for one in plan.selection_runs(cell)[:1]:
            write_record(tmp_path, make_record(one, make_result(None, dev=0.5)))
    return tmp_path


def _records(folder: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("runs/*.json"))]


def test_a_query_gives_what_the_records_hold(folder: Path) -> None:
    names, rows = query(
        folder,
        "SELECT digest, status, model, task, metric, kind, method, seed, learning_rate, "
        "train_examples, dev, test, steps, trainable, saved_bytes, peak_memory_bytes, "
        "train_seconds, failure, seconds, ended FROM runs ORDER BY digest",
    )
    wanted = []
    for one in _records(folder):
        spec, result, failure = one["run"], one["result"] or {}, one["failure"] or {}
        known = ("dev", "test", "steps", "trainable", "saved_bytes", "peak_memory_bytes")
        wanted.append((
            one["digest"], one["status"], spec["model"]["name"], spec["task"]["name"],
            spec["task"]["metric"], spec["kind"], spec["method"], spec["seed"],
            spec["settings"]["learning_rate"], spec["task"]["train"],
            *(result.get(name) for name in known), result.get("train_seconds"),
            failure.get("message"), one["seconds"],
        ))  # fmt: skip
    assert [row[:-1] for row in rows] == wanted and len(wanted) == 5
    assert {str(row[-1]) for row in rows} == {"2026-01-01 00:00:00"} and names[-1] == "ended"
    _, means = query(
        folder, "SELECT method, avg(test) FROM runs WHERE kind = 'final' GROUP BY 1 ORDER BY 1"
    )
    assert means == [("Full", pytest.approx(0.8)), ("LoRA", pytest.approx(0.705))]


def test_curves_have_every_evaluation(folder: Path) -> None:
    _, rows = query(folder, "SELECT digest, step, seconds, dev FROM curves ORDER BY digest, step")
    wanted = [
        (one["digest"], *point)
        for one in _records(folder)
        for point in (one["result"] or {"curve": []})["curve"]
    ]
    assert rows == wanted and len(rows) == 12


def test_an_export_reads_back_the_same(folder: Path, tmp_path: Path) -> None:
    path = export(folder, tmp_path / "runs.parquet")
    table = pyarrow.parquet.read_table(path).sort_by("digest").to_pydict()
    _, rows = query(folder, "SELECT digest, test FROM runs ORDER BY digest")
    assert list(zip(table["digest"], table["test"], strict=True)) == rows
    lines = export(folder, tmp_path / "curves.csv", "curves").read_text().splitlines()
    assert lines[0] == "digest,step,seconds,dev" and len(lines) == 13


def test_the_commands_print_and_write(folder: Path, tmp_path: Path, capsys) -> None:
    sql = "SELECT method, count(*) AS n FROM runs GROUP BY 1 ORDER BY 1"
    assert run(["study", "query", str(folder), sql, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == [{"method": "Full", "n": 2}, {"method": "LoRA", "n": 3}]
    assert run(["study", "query", str(folder), sql]) == 0
    assert "LoRA" in capsys.readouterr().out
    target = tmp_path / "x.csv"
    assert run(["study", "export", str(folder), str(target)]) == 0
    assert str(target) in capsys.readouterr().out and len(target.read_text().splitlines()) == 6


def test_what_cannot_be_asked_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(StudyError, match=r"refused `SELECT nope FROM runs`: .*`DESCRIBE runs`"):
        query(folder, "SELECT nope FROM runs")
    with pytest.raises(StudyError, match="the query is empty"):
        query(folder, " ")
    with pytest.raises(StudyError, match="holds no records"):
        query(tmp_path / "nothing", "SELECT 1")
    with pytest.raises(StudyError, match=r"`.*x\.txt`: `runs` cannot be written there"):
        export(folder, tmp_path / "x.txt")
    with pytest.raises(StudyError, match=r"refused `COPY runs .*"):
        export(folder, tmp_path / "no" / "x.csv")
    (folder / "runs" / ("0" * 64 + ".json")).write_text('{"digest": "0"')
    with pytest.raises(StudyError, match=r"cannot be read: .*delete that file"):
        query(folder, "SELECT 1")


def test_an_unfinished_export_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(StudyError):
        export(folder, tmp_path / "no" / "x.parquet")
    assert not list(tmp_path.glob("**/*.part"))
