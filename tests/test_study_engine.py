"""Studies end, survive kills and choose rates. Oracle: a fake worker with known outcomes."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

import study_fakes as fakes
from deltune.errors import StudyError
from deltune.study import events, pool
from deltune.study.engine import run_study
from deltune.study.plan import Cell, Plan, read_plan
from deltune.study.records import read_progress, read_record, record_path
from deltune.study.state import State


@pytest.fixture(autouse=True)
def _fake_worker(monkeypatch):
    monkeypatch.setattr(pool, "COMMAND", [sys.executable, fakes.__file__])


def grid_plan(**other) -> Plan:
    methods = [
        fakes.make_method("LoRA", "lora", (1e-4, 1e-3, 1e-2)),
        fakes.make_method("Head", "head"),
    ]
    return fakes.make_plan(methods, **other)


def begun(folder: Path) -> list[list[str]]:
    return [line.split() for line in (folder / "begun.txt").read_text().splitlines()]


def pids(folder: Path) -> list[int]:
    return [int(pid) for _, pid, _ in begun(folder)]


def wait_for(condition, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_runs_everything_and_chooses_by_dev_alone(tmp_path):
    plan = grid_plan()
    heard: list[events.Event] = []
    status = run_study(plan, tmp_path, workers=2, on_event=heard.append)
    assert (status.total, status.finished, status.left, status.failed) == (7, 7, 0, 0)
    state = State(plan, tmp_path)
    cell = Cell("tiny", "toy", "LoRA")
    assert state.chosen(cell) == 1e-3  # where `fake_dev` has its top
    assert [r.result.test for _, r in state.grid(cell) if r and r.result] == [None] * 3
    assert [run.task["test"] for run, _ in state.grid(cell)] == [0] * 3
    assert [record.spec.learning_rate for record in state.results(cell)] == [1e-3] * 2
    assert [record.spec.seed for record in state.results(cell)] == [0, 1]
    chosen = [event for event in heard if isinstance(event, events.RateChosen)]
    assert chosen == [events.RateChosen(cell, 1e-3)]
    kinds = Counter(type(event).__name__ for event in heard)
    assert kinds["RunStarted"] == kinds["RunEnded"] == 7
    assert kinds["StudyStarted"] == kinds["StudyEnded"] == 1


def test_each_run_has_its_own_process_and_its_share_of_threads(tmp_path):
    run_study(grid_plan(), tmp_path, workers=1)
    lines = begun(tmp_path)
    assert len({pid for _, pid, _ in lines}) == 7
    assert {threads for *_, threads in lines} == {str(len(os.sched_getaffinity(0)))}


def test_the_last_run_has_no_more_threads_than_the_others(tmp_path):
    """Threads change the last bits of a result, and a resumed study may have one run left."""
    cores = len(os.sched_getaffinity(0))
    run_study(grid_plan(), tmp_path, workers=cores)
    (final, _) = grid_plan().final_runs(Cell("tiny", "toy", "Head"), 1e-3)
    record_path(tmp_path, final.digest()).unlink()
    run_study(grid_plan(), tmp_path, workers=cores)
    assert {threads for *_, threads in begun(tmp_path)} == {"1"}


def test_second_call_runs_nothing(tmp_path):
    plan = grid_plan()
    run_study(plan, tmp_path, workers=2)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()}
    run_study(read_plan(tmp_path), tmp_path, workers=2)
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()}
    assert before == after and len(begun(tmp_path)) == 7


def test_another_setting_is_another_run(tmp_path):
    plan = grid_plan()
    run_study(plan, tmp_path, workers=2)
    head = plan.methods[1]
    longer = dataclasses.replace(head, settings={**head.settings, "num_train_epochs": 4.0})
    changed = dataclasses.replace(plan, methods=(plan.methods[0], longer))
    assert State(changed, tmp_path).status().left == 2
    run_study(changed, tmp_path, workers=2)
    assert len(begun(tmp_path)) == 9


@pytest.mark.parametrize("victim", ["study", "worker", "run"])
def test_killed_at_any_moment_it_goes_on(tmp_path, monkeypatch, victim):
    plan = grid_plan(seeds=(0, 1, 2))
    monkeypatch.setenv("FAKE_SECONDS", "0.3")
    text = json.dumps(dataclasses.asdict(plan))
    process = subprocess.Popen([sys.executable, fakes.__file__, str(tmp_path), text])
    records = tmp_path / "runs"
    wait_for(lambda: len(list(records.glob("*.json"))) >= 2 and any(map(alive, pids(tmp_path))))
    finished = {path.name: path.read_bytes() for path in records.glob("*.json")}
    runs = [pid for pid in pids(tmp_path) if alive(pid)]
    workers = children(process.pid)
    assert len(workers) == 2
    if victim == "study":
        process.kill()
        process.wait()
        wait_for(lambda: not any(map(alive, [*workers, *runs])), 3.0)
        assert len(list(records.glob("*.json"))) < 9
        run_study(plan, tmp_path, workers=2)
    else:
        os.kill(workers[0] if victim == "worker" else runs[0], signal.SIGKILL)
        assert process.wait(30) == 0
        if victim == "worker":
            wait_for(lambda: not any(map(alive, runs)), 3.0)
    state = State(plan, tmp_path)
    assert state.status().finished == 9 and not state.failures()
    assert {name: (records / name).read_bytes() for name in finished} == finished
    counts = Counter(digest for digest, *_ in begun(tmp_path))
    assert all(counts[Path(name).stem] == 1 for name in finished)
    lost = sum(count - 1 for count in counts.values())
    assert lost <= (2 if victim == "study" else 1)


def children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(word) for word in text.split()]


def test_a_failure_is_a_record_and_the_study_goes_on(tmp_path):
    methods = [
        fakes.make_method("Fails", "prompt"),
        fakes.make_method("High fails", "lora", (1e-3, 1e-1)),
        fakes.make_method("Head", "head"),
    ]
    plan = fakes.make_plan(methods)
    status = run_study(plan, tmp_path, workers=2)
    assert (status.finished, status.failed, status.left) == (5, 3, 0)
    state = State(plan, tmp_path)
    assert state.chosen(Cell("tiny", "toy", "High fails")) == 1e-3
    assert {record.failure.message for record in state.failures() if record.failure} == {
        "the loss is NaN"
    }
    assert run_study(plan, tmp_path, workers=2).failed == 3
    assert len(begun(tmp_path)) == 8
    run_study(plan, tmp_path, workers=2, retry_failed=True)
    assert len(begun(tmp_path)) == 11
    assert len(list((tmp_path / "retried").iterdir())) == 3


def test_no_rate_that_works_blocks_the_method_alone(tmp_path):
    methods = [fakes.make_method("Fails", "lora", (1e-3, 1e-2)), fakes.make_method("Head", "head")]
    status = run_study(fakes.make_plan(methods), tmp_path, workers=2)
    assert (status.total, status.failed, status.blocked, status.finished) == (6, 2, 2, 2)
    assert status.done


def test_a_run_that_is_killed_twice_fails(tmp_path):
    methods = [fakes.make_method("Dies", "lora"), fakes.make_method("Head", "head")]
    plan = fakes.make_plan(methods, seeds=(0,))
    status = run_study(plan, tmp_path, workers=1)
    assert (status.finished, status.failed) == (1, 1)
    failure = State(plan, tmp_path).failures()[0].failure
    assert failure and "signal 9" in failure.message
    assert len(begun(tmp_path)) == 3


def test_two_studies_in_one_folder_are_refused(tmp_path, monkeypatch):
    plan = grid_plan()
    monkeypatch.setenv("FAKE_SECONDS", "1")
    text = json.dumps(dataclasses.asdict(plan))
    process = subprocess.Popen([sys.executable, fakes.__file__, str(tmp_path), text])
    try:
        wait_for((tmp_path / "begun.txt").exists)
        with pytest.raises(StudyError, match=f"already running.*{process.pid}"):
            run_study(plan, tmp_path)
    finally:
        process.kill()
        process.wait()


def test_a_running_study_is_seen_from_outside(tmp_path, monkeypatch, capsys):
    from deltune.cli.app import run

    plan = grid_plan()
    monkeypatch.setenv("FAKE_SECONDS", "4")
    text = json.dumps(dataclasses.asdict(plan))
    process = subprocess.Popen([sys.executable, fakes.__file__, str(tmp_path), text])
    try:
        wait_for(lambda: read_progress(tmp_path)[1])
        assert run(["study", "status", str(tmp_path), "--json"]) == 0
        status = json.loads(capsys.readouterr().out)
        assert status["running"] == 2 and status["left"] == 7 - 2 - status["finished"]
        assert set(read_progress(tmp_path)[1]) <= {line[0] for line in begun(tmp_path)}
    finally:
        process.kill()
        process.wait()
    assert read_progress(tmp_path) == (1, {})  # what a killed study noted is not believed
    assert run(["study", "status", str(tmp_path), "--watch"]) == 0
    assert "running" not in capsys.readouterr().out


def test_a_worker_that_cannot_start_is_told_with_its_log(tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "COMMAND", [sys.executable, "-c", "raise SystemExit('no torch')"])
    with pytest.raises(StudyError, match="no torch"):
        run_study(grid_plan(), tmp_path, workers=1)


def test_a_disk_that_fills_stops_the_study_and_loses_nothing(tmp_path):
    def mount(*options):
        command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(tmp_path)]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    if not mount("size=60k"):
        pytest.skip("this user may not mount a small disk")
    try:
        with pytest.raises(StudyError, match="No space left on device"):
            run_study(grid_plan(seeds=tuple(range(12))), tmp_path, workers=2)
        there = {path: path.read_bytes() for path in (tmp_path / "runs").glob("*.json")}
        assert len(there) >= 3 and all(json.loads(content) for content in there.values())
        assert mount("remount", "size=2m")
        status = run_study(grid_plan(seeds=tuple(range(12))), tmp_path, workers=2)
        assert status.done and status.failed == 0
        assert all(path.read_bytes() == content for path, content in there.items())
        assert not list((tmp_path / "runs").glob(".*"))
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_damaged_and_foreign_records_are_refused(tmp_path):
    plan = grid_plan()
    run_study(plan, tmp_path, workers=2)
    run, other = plan.selection_runs(Cell("tiny", "toy", "LoRA"))[:2]
    path = tmp_path / "runs" / f"{run.digest()}.json"
    whole = path.read_text()
    path.write_text(whole[: len(whole) // 2])
    with pytest.raises(StudyError, match="delete it"):
        read_record(tmp_path, run)
    path.write_text((tmp_path / "runs" / f"{other.digest()}.json").read_text())
    with pytest.raises(StudyError, match="another run"):
        read_record(tmp_path, run)


def test_time_left_counts_down_to_nothing(tmp_path):
    heard: list[events.Event] = []
    status = run_study(grid_plan(), tmp_path, workers=1, on_event=heard.append)
    left = [event.status.seconds_left for event in heard if isinstance(event, events.RunEnded)]
    assert left == sorted(left, reverse=True) and left[-1] == status.seconds_left == 0


def test_a_job_that_arrives_before_the_last_one_is_buried_is_kept(tmp_path, monkeypatch):
    """The engine hears of a run's end from the run itself, a moment before the worker sees it."""
    monkeypatch.setenv("FAKE_LINGERS", "0.2")
    status = run_study(grid_plan(), tmp_path, workers=2)
    assert status.finished == 7
    assert len(begun(tmp_path)) == 7


def test_a_run_killed_after_its_word_of_the_end_harms_no_other(tmp_path, monkeypatch):
    plan = grid_plan()
    monkeypatch.setenv("FAKE_LINGERS", "1")
    text = json.dumps(dataclasses.asdict(plan))
    process = subprocess.Popen([sys.executable, fakes.__file__, str(tmp_path), text])
    try:
        for count in (1, 3):  # each time the next job waits in the worker already
            wait_for(lambda n=count: len(list((tmp_path / "runs").glob("*.json"))) >= n)
            time.sleep(0.3)
            done = {path.stem for path in (tmp_path / "runs").glob("*.json")}
            ended = [int(pid) for digest, pid, _ in begun(tmp_path) if digest in done]
            for pid in filter(alive, ended):
                os.kill(pid, signal.SIGKILL)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
    assert State(plan, tmp_path).status().finished == 7 and len(begun(tmp_path)) == 7


@pytest.mark.parametrize("victim", ["study", "worker"])
def test_orphans_die_at_once(tmp_path, victim):
    plan = fakes.make_plan([fakes.make_method("Sleeps", "lora")])
    text = json.dumps(dataclasses.asdict(plan))
    process = subprocess.Popen([sys.executable, fakes.__file__, str(tmp_path), text])
    try:
        wait_for(lambda: (tmp_path / "begun.txt").exists() and len(begun(tmp_path)) == 2)
        workers, runs = children(process.pid), pids(tmp_path)
        assert len(workers) == 2 and all(map(alive, runs))
        if victim == "study":
            process.kill()
            process.wait()
            wait_for(lambda: not any(map(alive, [*workers, *runs])), 3.0)
        else:
            children_of = {worker: children(worker) for worker in workers}
            os.kill(workers[0], signal.SIGKILL)
            wait_for(lambda: not any(map(alive, children_of[workers[0]])), 3.0)
            assert all(map(alive, children_of[workers[1]]))
    finally:
        process.kill()
        process.wait()


DEAF = """
import sys, time
from pathlib import Path
from deltune.study import execute, worker

def run_job(job, tell):
    try:
        for _ in range(500):
            tell({"event": "progress"})
            time.sleep(0.01)
    except Exception as error:  # as a run notes what it fails of
        Path(job["mark"]).write_text(repr(error))

execute.warm_up, execute.run_job = lambda models: None, run_job
worker.main()
"""


def test_a_run_whose_study_was_killed_does_not_fail_of_that(tmp_path: Path) -> None:
    """Its next word finds no reader, before it sees its standard input end."""
    mark = tmp_path / "mark"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", DEAF], **pipes) as worker:
        assert worker.stdin and worker.stdout
        job = {"digest": "0", "mark": str(mark)}
        worker.stdin.write(json.dumps({"models": []}).encode() + b"\n")
        worker.stdin.write(json.dumps(job).encode() + b"\n")
        worker.stdin.flush()
        assert b"ready" in worker.stdout.readline() and b"progress" in worker.stdout.readline()
        worker.stdout.close()
        time.sleep(0.5)
        assert not mark.exists()
        worker.kill()
