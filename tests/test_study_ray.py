"""A study on a local Ray cluster gives the records of local workers, timings aside."""

import dataclasses
import gc
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

import study_fakes as fakes
from deltune.errors import StudyError
from deltune.study import pool
from deltune.study.cluster import packed, unpack
from deltune.study.engine import run_study
from deltune.study.plan import Cell, Plan
from deltune.study.state import State

ray = pytest.importorskip("ray")
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.xdist_group("ray")]


@pytest.fixture(scope="module")
def cluster() -> Any:
    """Two processors, one worker each, which import the fake worker."""
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    ray.init(
        num_cpus=2, include_dashboard=False, log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": paths}},
    )  # fmt: skip
    yield ray
    ray.shutdown()
    gc.collect()  # Ray's own processes are not waited for, which is told where they are collected


def _plan() -> Plan:
    methods = [
        fakes.make_method("LoRA", "lora", (1e-4, 1e-3, 1e-2)),
        fakes.make_method("Fails", "prompt"),
        fakes.make_method("Head", "head"),
    ]
    plan = fakes.make_plan(methods, (0, 1))
    tasks = (plan.tasks[0], dataclasses.replace(plan.tasks[0], name="other"))
    return dataclasses.replace(plan, tasks=tasks)


def _records(folder: Path) -> dict[str, dict[str, Any]]:
    found = {}
    for path in (folder / "runs").glob("*.json"):
        record = json.loads(path.read_text())
        found[path.stem] = {n: v for n, v in record.items() if n not in ("seconds", "ended")}
    return found


@pytest.fixture(autouse=True)
def _fake_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "COMMAND", [sys.executable, fakes.__file__])


def test_the_records_are_those_of_local_workers(cluster: Any, tmp_path: Path) -> None:
    local = run_study(_plan(), tmp_path / "local", workers=2)
    status = run_study(_plan(), tmp_path / "ray", workers=2, engine="ray")
    assert (status.finished, status.failed) == (local.finished, local.failed) == (14, 4)
    assert _records(tmp_path / "ray") == _records(tmp_path / "local")
    assert State(_plan(), tmp_path / "ray").chosen(Cell("tiny", "toy", "LoRA")) == 1e-3


def test_a_run_that_kills_its_process_is_tried_twice_and_fails(
    cluster: Any, tmp_path: Path
) -> None:
    methods = [fakes.make_method("Dies", "lora"), fakes.make_method("Head", "head")]
    plan = fakes.make_plan(methods, seeds=(0,))
    status = run_study(plan, tmp_path, workers=2, engine="ray")
    assert (status.finished, status.failed, status.left) == (1, 1, 0)
    failure = State(plan, tmp_path).failures()[0].failure
    assert failure and f"signal {signal.SIGKILL.value}" in failure.message


def test_a_cluster_that_is_not_there_is_named(cluster: Any, tmp_path: Path) -> None:
    ray.shutdown()
    gc.collect()
    with pytest.raises(StudyError, match=r"no Ray cluster at `127\.0\.0\.1:1`"):
        run_study(_plan(), tmp_path, workers=1, engine="ray", address="127.0.0.1:1")


def test_an_archive_is_the_folder_again(tmp_path: Path) -> None:
    (tmp_path / "a" / "0").mkdir(parents=True)
    (tmp_path / "a" / "0" / "x.json").write_text("{}")
    (tmp_path / "a" / "y.bin").write_bytes(bytes(range(256)))
    unpack(packed(tmp_path / "a"), tmp_path / "b")
    files = {p.relative_to(tmp_path / "b"): p.read_bytes() for p in (tmp_path / "b").rglob("*.*")}
    assert files == {Path("0/x.json"): b"{}", Path("y.bin"): bytes(range(256))}
