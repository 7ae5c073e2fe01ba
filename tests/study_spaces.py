"""A small study with subspaces, run once for all tests that look at it (see `conftest.py`)."""

import os
from pathlib import Path

import pytest
import torch

import deltune as dt
import tasks_toys
from deltune.study.engine import run_study
from deltune.study.plan import Cell, read_plan
from deltune.study.resolve import plan_study
from deltune.study.state import State
from deltune.subspace.solutions import Solutions

STUDY = """
[[models]]
name = "{home}/model"
title = "tiny"
head = "embedding"
[[tasks]]
name = "{home}/task"
title = "a"
[[tasks]]
name = "{home}/b"
title = "b"
[[tasks]]
name = "{home}/c"
title = "c"
[[tasks]]
name = "{home}/unseen"
title = "new"
[study]
name = "Spaces"
seeds = [5, 6]
[budget]
train = 16
[train]
num_train_epochs = 1
per_device_train_batch_size = 8
allow_unused = true
[[methods]]
name = "LoRA"
spec = "lora(rank=1)"
learning_rate = [1e-2]
[[methods]]
name = "Bits"
spec = "bitfit"
learning_rate = [1e-2]
[[methods]]
name = "Adapter"
spec = "adapter(width=2)"
learning_rate = [1e-2]
[subspace]
unseen = ["new"]
learning_rate = [1e-2, 1e-1]
spaces = {{ principal = [3], random = [3], learned = [3] }}
train = {{ max_steps = 4, eval_steps = 2 }}
fit = {{ steps = 5, learning_rate = 1e-3 }}
landscapes = ["new"]
points = 3
"""
SPECS = {"LoRA": "lora(rank=1)", "Bits": "bitfit", "Adapter": "adapter(width=2)"}


@pytest.fixture(scope="session")
def space_study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, State]:
    """A study of a tiny model, run to its end."""
    home = tasks_toys.home(tmp_path_factory.mktemp("spaces"))
    for name, labels in (("b", ("no", "yes")), ("c", ("film", "good")), ("unseen", ("is", "was"))):
        tasks_toys.write_task(home / name, labels)
    file = home / "study.toml"
    file.write_text(STUDY.format(home=home))
    status = run_study(plan_study(file), home / "out", workers=len(os.sched_getaffinity(0)))
    state = State(read_plan(home / "out"), home / "out")
    assert status.done, status
    assert not state.failures(), state.failures()[0].failure
    runs = 3 * 3 + 3 * 2  # the seen tasks once
    assert (status.total, status.finished) == (runs + 1 + 3 * (1 + 3 * 2 + 1), runs + 1 + 3 * 8)
    return home, state


def solutions(home: Path, state: State, tasks: str, place: Path) -> Solutions:
    model, _ = dt.load_model(str(home / "model"), "embedding")
    starts, folders = {}, {}
    for name, spec in SPECS.items():
        torch.manual_seed(5)
        delta = dt.attach(model, spec)
        starts[name] = delta.save(place / name)
        delta.detach()
        finals = {task: state.finals(Cell("tiny", task, name))[0] for task in tasks}
        folders[name] = {t: home / "out" / "deltas" / run.digest() for t, run in finals.items()}
    return Solutions.saved(folders, starts)
