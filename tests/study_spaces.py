"""A small study with subspaces, run once for all tests that look at it (see `conftest.py`)."""

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import deltune as dt
import tasks_toys
from deltune.study.engine import run_study
from deltune.study.plan import Cell, read_plan
from deltune.study.resolve import plan_study
from deltune.study.state import State
from deltune.subspace.learned import fit
from deltune.subspace.settings import FitSettings
from deltune.subspace.solutions import Solutions
from deltune.subspace.space import Subspace
from deltune.training.generators import seed_step

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
spec = "adapter(width=2, init='bert', scale=30)"
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
SINGLE = """
models = [{{ name = "{home}/model", title = "tiny", head = "embedding" }}]
tasks = [{{ name = "{home}/task", title = "a" }}, {{ name = "{home}/unseen", title = "new" }}]
[study]
name = "A space of one task"
seeds = [5]
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
name = "Adapter"
spec = "adapter(width=2, init='bert', scale=30)"
learning_rate = [1e-2]
[subspace]
unseen = ["new"]
learning_rate = [1e-1]
spaces = {{ learned = [4], random = [4], fastfood = [4] }}
train = {{ max_steps = 2, eval_steps = 2 }}
fit = {{ steps = 5, learning_rate = 1e-3, weight = 0.1 }}
"""
FOLDERS = {"a": "task", "new": "unseen"}
"""Of tasks that are not called as their folders."""
SPECS = {
    "LoRA": "lora(rank=1)",
    "Bits": "bitfit",
    "Adapter": "adapter(width=2, init='bert', scale=30)",
}
"""The last acts before it is trained, so that it is seen where it should not be."""


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


@pytest.fixture(scope="session")
def single_study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, State]:
    """A study with one seen task, run to its end."""
    home = tasks_toys.home(tmp_path_factory.mktemp("single"))
    tasks_toys.write_task(home / "unseen", ("is", "was"))
    (home / "study.toml").write_text(SINGLE.format(home=home))
    status = run_study(plan_study(home / "study.toml"), home / "out", workers=2)
    state = State(read_plan(home / "out"), home / "out")
    assert not state.failures(), state.failures()[0].failure
    assert (status.total, status.finished) == (2 * 2 + 1 + 3 * (1 + 2),) * 2
    return home, state


def solutions(
    home: Path, state: State, tasks: str, place: Path, methods: Sequence[str] = tuple(SPECS)
) -> Solutions:
    model, _ = dt.load_model(str(home / "model"), "embedding")
    starts, folders = {}, {}
    for name in methods:
        torch.manual_seed(5)
        delta = dt.attach(model, SPECS[name])
        starts[name] = delta.save(place / name)
        delta.detach()
        finals = {task: state.finals(Cell("tiny", task, name))[0] for task in tasks}
        folders[name] = {t: home / "out" / "deltas" / run.digest() for t, run in finals.items()}
    return Solutions.saved(folders, starts)


def learned_by_hand(home: Path, seen: Solutions, settings: FitSettings) -> Subspace:
    """A learned space from losses of its own: the batch of a step out of the records of its task,
    each method alone on a model, and the likeness to the labels' names written out."""
    tasks = [dt.load_task(home / FOLDERS.get(name, name)).limited(train=16) for name in seen.tasks]
    model, tokenizer = dt.load_model(str(home / "model"), "embedding")
    models = {}
    for name in seen.methods:
        models[name], _ = dt.load_model(str(home / "model"), "embedding")
        torch.manual_seed(5)
        models[name] = dt.attach(models[name].train(), SPECS[name])

    def embedded(texts: list[str], forward: Callable[..., Any]) -> torch.Tensor:
        tokens = tokenizer(texts, padding=True, return_tensors="pt")
        inputs = {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask}
        real = tokens.attention_mask.unsqueeze(-1)
        return (forward(**inputs).last_hidden_state * real).sum(1) / real.sum(1)

    with torch.no_grad():
        names = [embedded(list(task.labels or ()), model.eval()) for task in tasks]

    def losses(at: int, step: int) -> Callable[[str, torch.Tensor], torch.Tensor]:
        draw, records = torch.Generator().manual_seed(step), tasks[at].train
        chosen = [records[i] for i in torch.randint(16, (8,), generator=draw).tolist()]
        right = torch.tensor([list(tasks[at].labels or ()).index(r.target) for r in chosen])

        def loss(method: str, vector: torch.Tensor) -> torch.Tensor:
            seed_step(5, 0, step, vector.device)  # of dropout
            texts = embedded([r.input for r in chosen], partial(models[method].call, vector))
            likeness = torch.cosine_similarity(texts[:, None], names[at][None], dim=-1)
            return torch.nn.functional.cross_entropy(20 * likeness, right)

        return loss

    return fit(seen, settings, losses)
