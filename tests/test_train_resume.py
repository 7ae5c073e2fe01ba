"""Oracle: the same run without interruption, bit for bit."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from deltune.errors import TrainError
from deltune.tasks.task import Task
from deltune.training import checkpoint
from deltune.training.events import Checkpointed, Event, Started, Step
from deltune.training.loop import TrainResult, train
from train_toy import Squares, network, settings, toy_task


class Killed(Exception):
    pass


def kill_after(step: int) -> Callable[[Event], None]:
    def watch(event: Event) -> None:
        if isinstance(event, Step) and event.step == step:
            raise Killed

    return watch


CHOSEN: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "num_train_epochs": 4,
    "warmup_steps": 2,
    "weight_decay": 0.1,
    "eval_steps": 3,
    "save_steps": 2,
}
"""Twelve steps of 11 examples, the last of each epoch short; checkpoints at 2, 3, 4, 6, 8 ..."""


def run(
    model: nn.Module,
    folder: Path | None = None,
    on_event: Callable[[Event], None] | None = None,
    task: Task | None = None,
    **changes: Any,
) -> TrainResult:
    chosen = settings(**(CHOSEN | changes))
    task = task or toy_task(train=11)
    return train(
        model, None, task, None, chosen, objective=Squares(), folder=folder, on_event=on_event
    )


def same(one: TrainResult, two: TrainResult) -> bool:
    def timeless(result: TrainResult) -> tuple:
        curve = [(step, value) for step, _, value in result.curve]
        return result.losses, curve, result.best_dev, result.best_step, result.steps, result.stopped

    return timeless(one) == timeless(two)


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
@pytest.mark.parametrize("kills", [(1,), (2,), (5,), (9, 11), (4, 6, 7, 12)])
def test_killed_and_resumed_equals_uninterrupted(
    tmp_path: Path, kills: tuple[int, ...], optimizer: str
) -> None:
    straight = network()
    whole = run(straight, tmp_path / "whole", optimizer=optimizer)
    for number, step in enumerate(kills):
        torch.manual_seed(number)
        with pytest.raises(Killed):
            run(network(), tmp_path / "cut", kill_after(step), optimizer=optimizer)
    resumed, starts = network(), []
    parts = run(resumed, tmp_path / "cut", starts.append, optimizer=optimizer)
    assert same(whole, parts) and len(whole.losses) == 12
    for a, b in zip(straight.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    saved = {1: 0, 2: 0, 5: 4, 11: 10, 12: 10}[kills[-1]]
    assert isinstance(starts[0], Started) and starts[0].resumed_at == saved


def test_dropout_matters_in_these_runs() -> None:
    calm, noisy = network(), network()
    calm[3].p = 0.0
    assert run(calm).losses != run(noisy).losses


def test_early_stopping_survives_a_kill(tmp_path: Path) -> None:
    common = {"eval_steps": 1, "early_stopping_patience": 3, "save_steps": None}
    straight, resumed = network(), network()
    whole = run(straight, **common)
    assert whole.stopped == "early"
    with pytest.raises(Killed):
        run(network(), tmp_path, kill_after(whole.steps), **common)
    assert same(whole, run(resumed, tmp_path, **common))
    assert torch.equal(straight[0].weight, resumed[0].weight)


def test_a_finished_run_is_read_and_not_repeated(tmp_path: Path) -> None:
    first, again = network(), network(seed=5)
    whole, events = run(first, tmp_path), []
    parts = run(again, tmp_path, events.append)
    assert whole == parts or same(whole, parts)
    assert not [event for event in events if isinstance(event, Step)]
    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True)
    )


def test_files_hold_trainable_tensors_and_json_only(tmp_path: Path) -> None:
    model = network()
    model[0].requires_grad_(False)
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "step-7").mkdir()
    events: list[Event] = []
    run(model, tmp_path, events.append)
    assert [e.step for e in events if isinstance(e, Checkpointed)] == [2, 3, 4, 6, 8, 9, 10, 12]
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"checkpoint-5", "step-7", "step-12"}
    folder = tmp_path / "step-12"
    assert {path.name for path in folder.iterdir()} == {
        "model.safetensors",
        "best.safetensors",
        "optimizer.safetensors",
        "state.json",
    }
    keys = {"1.weight", "1.bias", "4.weight", "4.bias"}
    assert set(load_file(folder / "model.safetensors")) == keys
    assert set(load_file(folder / "best.safetensors")) == keys
    assert len(load_file(folder / "optimizer.safetensors")) == 3 * len(keys)
    assert json.loads((folder / "state.json").read_text())["progress"]["step"] == 12


@pytest.mark.parametrize(
    ("changes", "both"),
    [
        ({"learning_rate": 0.07}, ("settings, `learning_rate`", "0.05", "0.07")),
        ({"num_train_epochs": 5}, ("settings, `num_train_epochs`", "4", "5")),
        ({"task": toy_task(train=11, seed=1)}, ("task, `data digest`", "", "")),
    ],
)
def test_another_run_is_refused_with_both_sides(
    tmp_path: Path, changes: dict, both: tuple[str, str, str]
) -> None:
    run(network(), tmp_path)
    with pytest.raises(TrainError) as caught:
        run(network(), tmp_path, **changes)
    text = str(caught.value)
    what, there, here = both
    assert f"{tmp_path / 'step-12'}` belongs to another run" in text and what in text
    assert f"checkpoint: {there}" in text and f"this run:   {here}" in text
    assert text.count("checkpoint: ") == 1 and "use another folder" in text


def test_other_tensors_are_refused(tmp_path: Path) -> None:
    run(network(), tmp_path)
    model = network()
    model[0].requires_grad_(False)
    with pytest.raises(
        TrainError, match=r"tensors, `0.weight`:\s+checkpoint: torch.float64\[8, 3\]"
    ):
        run(model, tmp_path)


def test_where_it_is_saved_does_not_matter(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run(network(), tmp_path, kill_after(7))
    assert same(run(network()), run(network(), tmp_path, save_steps=5))


def test_full_disk_keeps_the_earlier_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = checkpoint.save_file, []

    def full(tensors: dict, path: Path) -> None:
        calls.append(path)
        if len(calls) == 8:  # the last file of the third checkpoint
            raise OSError(28, "No space left on device")
        real(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(TrainError, match=r"step 4 could not be written.*No space left"):
        run(network(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-3"]
    monkeypatch.undo()
    assert same(run(network()), run(network(), tmp_path))


@pytest.mark.parametrize("name", ["model", "best", "optimizer", "state"])
def test_damaged_files_are_named(tmp_path: Path, name: str) -> None:
    run(network(), tmp_path)
    file = tmp_path / "step-12" / f"{name}.{'json' if name == 'state' else 'safetensors'}"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(TrainError, match=rf"{name}\.\w+` cannot be read.*delete"):
        run(network(), tmp_path)


SCRIPT = """
import os, signal, sys
from pathlib import Path
import torch
from test_train_resume import run, network
from deltune.training import checkpoint

folder, writes = Path(sys.argv[1]), []
real = checkpoint._flush

def deadly(part):
    writes.append(part)
    if len(writes) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    real(part)

checkpoint._flush = deadly
run(network(), folder)
"""


def test_killed_in_the_middle_of_a_write(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        cwd=Path(__file__).parent,
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = sorted(path.name for path in tmp_path.iterdir())
    assert len(left) == 2 and left[0].startswith(".step-4.part-") and left[1] == "step-3"
    straight, resumed = network(), network()
    assert same(run(straight), run(resumed, tmp_path))
    assert torch.equal(straight[0].weight, resumed[0].weight)
    assert [path.name for path in tmp_path.iterdir()] == ["step-12"]
