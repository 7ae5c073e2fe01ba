"""Oracle: the same run in one process."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from deltune.errors import TrainError
from deltune.training.evaluation import evaluate
from deltune.training.events import Event
from deltune.training.loop import train
from deltune.training.world import this_world
from train_toy import Squares, network, settings, toy_task

EXAMPLES = 9  # in steps of 4: the last one leaves the second of two processes nothing to do


def main(out: Path, size: int) -> None:
    """One process of the run: writes its parameters and what it saw."""
    model, events = network(seed=int(os.environ.get("RANK", "0"))), []
    if this_world().size == 1:
        model = network(seed=0)
    model[3].p = 0.0
    task, chosen = toy_task(train=EXAMPLES, dev=5), settings(per_device_train_batch_size=size)

    def watch(event: Event) -> None:
        events.append(type(event).__name__)

    def once(module: torch.nn.Module) -> tuple:
        folder = out / f"run-{this_world().size}"
        return train(
            module, None, task, None, chosen, objective=Squares(), folder=folder, on_event=watch
        )

    result, again = once(model), network(seed=7)
    repeated = once(again)
    assert repeated.losses == result.losses
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )
    found = evaluate(model, None, task, objective=Squares(), batch_size=2)
    name = f"{this_world().size}-{this_world().rank}"
    save_file({key: t.detach() for key, t in model.named_parameters()}, out / f"{name}.safetensors")
    seen = {"losses": result.losses, "events": events, "predictions": found.predictions}
    seen |= {"curve": [(step, value) for step, _, value in result.curve]}
    (out / f"{name}.json").write_text(json.dumps(seen))


ACCELERATE = ("accelerate.commands.launch", "--multi_gpu", "--num_machines", "1")
ACCELERATE += ("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port")
TORCHRUN = ("torch.distributed.run", "--master_port")


def launch(words: tuple[str, ...], out: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    count = "--num_processes" if words == ACCELERATE else "--nproc_per_node"
    done = subprocess.run(
        [sys.executable, "-m", *words, port, count, "2", __file__, str(out), "2"],
        cwd=Path(__file__).parent,
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        check=False,
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr[-3000:]


# `accelerate launch --cpu --num_processes 2` starts one process only; with `--multi_gpu` it starts
# two, also where there is no GPU.
@pytest.mark.parametrize("words", [ACCELERATE, TORCHRUN], ids=["accelerate", "torchrun"])
def test_two_processes_equal_one(words: tuple[str, ...], tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    main(tmp_path, size=4)
    launch(words, tmp_path)
    alone, *both = [load_file(tmp_path / f"{name}.safetensors") for name in ("1-0", "2-0", "2-1")]
    one, first, second = [
        json.loads((tmp_path / f"{name}.json").read_text()) for name in ("1-0", "2-0", "2-1")
    ]
    for name, tensor in alone.items():
        assert torch.equal(both[0][name], both[1][name])
        torch.testing.assert_close(both[0][name], tensor, rtol=1e-10, atol=1e-12)
    assert first["losses"] == pytest.approx(one["losses"], rel=1e-10)
    assert first["losses"] == second["losses"]
    assert first["curve"] == second["curve"] == one["curve"]
    assert first["predictions"] == second["predictions"] == one["predictions"]
    assert first["events"] == one["events"] and second["events"] == []
    assert {path.name for path in (tmp_path / "run-2").iterdir()} == {"step-6"}


def test_processes_that_do_not_know_of_each_other_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    state = pytest.importorskip("accelerate").PartialState
    state(cpu=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    try:
        with pytest.raises(TrainError, match="2 processes were started and accelerate joined 1"):
            this_world()
    finally:
        state._reset_state()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
