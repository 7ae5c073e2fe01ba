"""A real study, killed again and again or run on a cluster, gives an undisturbed one's records.

Oracle: the undisturbed study of the same file, run by local workers.
"""

import gc
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import tasks_toys
from deltune.study.engine import run_study
from deltune.study.resolve import plan_study

pytestmark = [
    pytest.mark.thorough,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.xdist_group("whole"),
]

KILLS = 20
TIMINGS = ("train_seconds", "eval_seconds", "load_seconds", "start_memory_bytes",
           "peak_memory_bytes")  # fmt: skip
"""What differs from one run to the next; memory is a timing's like: it depends on the allocator."""

STUDY = """
tasks = [{{ name = "{home}/task" }}, {{ name = "{home}/other" }}]
models = [{{ name = "{home}/model", head = "classification" }}]
[study]
name = "Whole"
seeds = [0, 1]
[train]
num_train_epochs = 3
per_device_train_batch_size = 4
[[methods]]
name = "LoRA"
spec = "lora(rank=2)"
learning_rate = [1e-2, 1e-3]
[[methods]]
name = "Adapter"
spec = "adapter(width=2, dropout=0.1)"
learning_rate = [1e-2]
[[methods]]
name = "Full"
spec = "full"
learning_rate = [1e-3]
[[methods]]
name = "Fails"
spec = "phm(n=7)"
learning_rate = [1e-3]
[transfer]
methods = ["LoRA"]
"""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The study file, and the records of its study."""
    home = tasks_toys.home(tmp_path_factory.mktemp("whole"))
    tasks_toys.write_task(home / "other", ("no", "yes", "maybe"))
    file = home / "study.toml"
    file.write_text(STUDY.format(home=home))
    status = run_study(plan_study(file), home / "out", workers=2)
    assert status.done and status.failed == 4
    return file, records(home / "out")


def records(folder: Path) -> dict[str, Any]:
    """Every record without its timings."""
    found = {}
    for path in (folder / "runs").iterdir():
        record = json.loads(path.read_text())
        for name in ("seconds", "ended", "machine"):
            del record[name]
        if record["result"]:
            record["result"]["curve"] = [[at, dev] for at, _, dev in record["result"]["curve"]]
            for name in TIMINGS:
                del record["result"][name]
        found[path.name] = record
    return found


def test_killed_at_twenty_random_moments(undisturbed: Any, tmp_path: Path) -> None:
    file, expected = undisturbed
    command = [sys.executable, "-m", "deltune", "study", "run", str(file), "--out", str(tmp_path)]
    draw, killed = random.Random(0), {"study": 0, "worker": 0}
    while sum(killed.values()) < KILLS:
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as study:
            if draw.random() < 0.75:  # else while it starts
                wait_for_record(study, tmp_path)
            time.sleep(draw.uniform(0.0, 2.0))
            victim = draw.choice(sorted(killed))
            family = descendants(study.pid) if victim == "worker" else [study.pid]
            if study.poll() is None and family:
                os.kill(draw.choice(family), signal.SIGKILL)
                killed[victim] += 1
            if victim == "worker":
                time.sleep(draw.uniform(0.0, 2.0))
            study.kill()
        there = records_there(tmp_path)
        if len(there) > len(expected) - 4:
            for path in draw.sample(there, 8):  # so that something is left to kill
                path.unlink()
    status = run_study(plan_study(file), tmp_path, workers=2)
    assert status.done and min(killed.values()) > 2
    assert records(tmp_path) == expected


def test_a_ray_cluster_gives_the_same_records(undisturbed: Any, tmp_path: Path) -> None:
    file, expected = undisturbed
    on_ray(file, tmp_path)
    assert records(tmp_path) == expected


def test_a_ray_cluster_gives_the_same_subspaces(space_study: Any, tmp_path: Path) -> None:
    home, _ = space_study
    on_ray(home / "study.toml", tmp_path)
    assert records(tmp_path) == records(home / "out")
    kept = [sorted(p.name for p in (at / "spaces").iterdir()) for at in (tmp_path, home / "out")]
    assert kept[0] == kept[1]


def on_ray(file: Path, out: Path) -> None:
    """Runs a study on a local cluster of two workers."""
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        assert run_study(plan_study(file), out, workers=2, engine="ray").done
    finally:
        ray.shutdown()
        gc.collect()


def wait_for_record(study: subprocess.Popen[bytes], folder: Path) -> None:
    """Until one more run has ended, or the study."""
    before = len(records_there(folder))
    while study.poll() is None and len(records_there(folder)) <= before:
        time.sleep(0.02)


def records_there(folder: Path) -> list[Path]:
    """Paths of the finished records, in order."""
    return sorted((folder / "runs").glob("*.json")) if (folder / "runs").exists() else []


def descendants(pid: int) -> list[int]:
    """Processes that a process started, and those that these did."""
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:
        return []
    return [one for child in map(int, text.split()) for one in (child, *descendants(child))]
