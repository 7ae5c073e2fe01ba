"""Oracle: the same run in one process."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import deltune as dt
from deltune.errors import TrainError
from deltune.training.evaluation import evaluate
from deltune.training.events import Event
from deltune.training.loop import train
from deltune.training.world import this_world
from train_toy import LABELS, Example, Squares, network, settings, toy_task
from zoo import ZOO

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


SPEC = "lora(rank=2) + bitfit + prefix(tokens=2)"


def attached(rank: int) -> dt.Delta:
    """A delta that every process starts otherwise, on a model in double precision."""
    return dt.attach(ZOO["bert"].build(0).double(), SPEC, name="mine", seed=rank)


class Words(Squares):
    """Classes of the numbers, which are words of BERT."""

    def collate(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        words = torch.tensor([example.numbers for example in examples]).long() + 10
        return {"input_ids": words, "labels": torch.tensor([e.label for e in examples])}

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model(**batch).loss

    def predict(self, model: nn.Module, batch: dict[str, Tensor]) -> list[str]:
        return [LABELS[int(row[:2].argmax())] for row in model(**batch).logits]


def note(out: Path, kind: str, delta: dt.Delta, **seen: Any) -> None:
    """What a process has at the end."""
    name = f"{kind}-{os.environ.get('WORLD_SIZE', '1')}-{os.environ.get('RANK', '0')}"
    save_file({key: t.detach() for key, t in delta.tensors().items()}, out / f"{name}.safetensors")
    (out / f"{name}.json").write_text(json.dumps(seen))


def with_a_delta(out: Path, size: int) -> None:
    """`dt.train`."""
    delta, events = attached(int(os.environ.get("RANK", "0"))), list[str]()
    chosen = settings(per_device_train_batch_size=size, backbone_dropout=False, learning_rate=0.01)
    result = dt.train(
        delta.model, None, toy_task(train=EXAMPLES, dev=5), delta, chosen, objective=Words(),
        folder=out / f"delta-run-{this_world().size}",
        on_event=lambda event: events.append(type(event).__name__),
    )  # fmt: skip
    note(
        out,
        "delta",
        delta,
        losses=result.losses,
        events=events,
        curve=[c[::2] for c in result.curve],
    )


def under_trainer(out: Path, size: int) -> None:
    """`Trainer` with `DeltaCallback`, and who saved.

    By default Trainer counts the loss of a model that takes the number of items and does not use
    it, as BERT's classifier does, once for each process.
    """
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from deltune.training.callback import DeltaCallback

    delta, gradients, saved = attached(int(os.environ.get("RANK", "0"))), list[Tensor](), []
    save = delta.save

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            if not gradients:
                gradients.extend(p.grad.double().clone() for p in delta.parameters())

    def noted(path: Path, **options: Any) -> Path:
        saved.append(path.parent.name)
        return save(path, **options)

    delta.save = noted
    draw = torch.Generator().manual_seed(3)
    words = torch.randint(4, 60, (12, 6), generator=draw)
    folder = out / f"trainer-run-{os.environ.get('WORLD_SIZE', '1')}"
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=6, save_steps=3, per_device_train_batch_size=size,
        learning_rate=1e-2, report_to="none", use_cpu=True, disable_tqdm=True,
        dataloader_pin_memory=False, max_grad_norm=0.0, average_tokens_across_devices=False,
    )  # fmt: skip
    model: Any = delta.model
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    Trainer(
        model, arguments, train_dataset=[{"input_ids": w, "labels": w[0] % 3} for w in words],
        callbacks=[DeltaCallback(delta), Watch()],
    ).train()  # fmt: skip
    flat = torch.cat([g.reshape(-1) for g in gradients]).tolist()
    note(out, "trainer", delta, gradients=flat, saved=saved)


RUNS = {"network": main, "delta": with_a_delta, "trainer": under_trainer}
ACCELERATE = ("accelerate.commands.launch", "--multi_gpu", "--num_machines", "1")
ACCELERATE += ("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port")
TORCHRUN = ("torch.distributed.run", "--master_port")


def launch(words: tuple[str, ...], out: Path, run: str = "network") -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    count = "--num_processes" if words == ACCELERATE else "--nproc_per_node"
    done = subprocess.run(
        [sys.executable, "-m", *words, port, count, "2", __file__, str(out), "2", run],
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


def both(out: Path, kind: str) -> list[tuple[dict[str, Tensor], Any]]:
    """What one process, and each of two, has at the end: tensors, and what it saw."""
    return [
        (
            load_file(out / f"{kind}-{n}.safetensors"),
            json.loads((out / f"{kind}-{n}.json").read_text()),
        )
        for n in ("1-0", "2-0", "2-1")
    ]


def equal(found: list[tuple[dict[str, Tensor], Any]]) -> None:
    """Two processes have the same tensors, and those of one; they have learned something."""
    (alone, _), (first, _), (second, _) = found
    start = attached(0).tensors()
    for name, tensor in alone.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], tensor, rtol=1e-8, atol=1e-10)
    assert any(not torch.equal(tensor, start[name]) for name, tensor in alone.items())
    assert any(not torch.equal(t, attached(1).tensors()[n]) for n, t in start.items())


def test_a_delta_under_accelerate_launch(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    with_a_delta(tmp_path, size=4)
    launch(ACCELERATE, tmp_path, "delta")
    found = both(tmp_path, "delta")
    equal(found)
    one, first, second = (seen for _, seen in found)
    assert first["losses"] == second["losses"] == pytest.approx(one["losses"], rel=1e-10)
    assert first["curve"] == second["curve"] == one["curve"]
    assert first["events"] == one["events"] and second["events"] == []
    (kept,) = (tmp_path / "delta-run-2").iterdir()
    assert kept.name == "step-6"


def test_trainer_with_the_callback_under_accelerate_launch(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    under_trainer(tmp_path, size=4)
    launch(ACCELERATE, tmp_path, "trainer")
    found = both(tmp_path, "trainer")
    equal(found)
    one, first, second = (seen for _, seen in found)
    assert first["gradients"] == second["gradients"]
    assert first["gradients"] == pytest.approx(one["gradients"], rel=1e-8, abs=1e-12)
    assert any(one["gradients"])
    assert first["saved"] == one["saved"] == ["checkpoint-3", "checkpoint-6"]
    assert second["saved"] == []
    for step in (3, 6):
        loaded = [
            dt.load(
                tmp_path / f"trainer-run-{n}/checkpoint-{step}/delta", ZOO["bert"].build(0).double()
            )
            for n in (1, 2)
        ]
        torch.testing.assert_close(loaded[1].vector(), loaded[0].vector(), rtol=1e-8, atol=1e-10)
    assert all(torch.equal(found[1][0][n], t) for n, t in loaded[1].tensors().items())


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
    RUNS[sys.argv[3]](Path(sys.argv[1]), int(sys.argv[2]))
