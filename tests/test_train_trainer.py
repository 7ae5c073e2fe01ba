"""Oracle: transformers.Trainer itself, on the whole model."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

import deltune as dt
from deltune.errors import TrainError
from deltune.training.callback import DeltaCallback
from zoo import ZOO

BERT = ZOO["bert"]
SPEC = "lora(rank=2, dropout=0.1) + bitfit"


def rows(count: int = 12) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 60, (count, 6), generator=generator)
    return [{"input_ids": row, "labels": row[0] % 3} for row in ids]


def trainer(model: nn.Module, out: Path, *callbacks: TrainerCallback, **changes: Any) -> Trainer:
    usual: dict[str, Any] = {
        "max_steps": 6,
        "save_steps": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    arguments = TrainingArguments(output_dir=str(out), **(usual | changes))
    return Trainer(
        model, arguments, train_dataset=rows(), eval_dataset=rows(4), callbacks=list(callbacks)
    )


def attached() -> tuple[nn.Module, Any]:
    model = BERT.build(0)
    return model, dt.attach(model, dt.parse(SPEC), name="mine", seed=0)


def test_trains_unmodified_and_saves_the_delta_alone(tmp_path: Path) -> None:
    model, delta = attached()
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    before = delta.vector()
    trainer(model, tmp_path, DeltaCallback(delta)).train()
    assert not torch.equal(delta.vector(), before)
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[name], value) for name, value in frozen.items())

    fresh = BERT.build(0)
    loaded = dt.load(tmp_path / "checkpoint-6" / "delta", fresh)
    assert torch.equal(loaded.vector(), delta.vector())
    assert torch.equal(BERT.run(fresh.eval()), BERT.run(model.eval()))
    kept = load_file(tmp_path / "checkpoint-6" / "model.safetensors")
    assert set(kept) == {n for n, p in parameters.items() if p.requires_grad}


def test_the_callback_changes_nothing_in_training_and_resumes(tmp_path: Path) -> None:
    (plain, _), (watched, delta), (again, other) = attached(), attached(), attached()
    trainer(plain, tmp_path / "plain").train()
    trainer(watched, tmp_path / "watched", DeltaCallback(delta)).train()
    resumed = trainer(again, tmp_path / "watched", DeltaCallback(other))
    resumed.train(resume_from_checkpoint=str(tmp_path / "watched" / "checkpoint-3"))
    for a, b, c in zip(plain.parameters(), watched.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_the_backbone_stays_on_request(tmp_path: Path) -> None:
    model, delta = attached()
    trainer(model, tmp_path, DeltaCallback(delta, keep_backbone=True)).train()
    kept = load_file(tmp_path / "checkpoint-6" / "model.safetensors")
    assert len(kept) > len(list(delta.parameters())) + 20
    assert (tmp_path / "checkpoint-6" / "delta" / "delta.safetensors").is_file()


def test_shards_of_a_large_backbone_go_too(tmp_path: Path) -> None:
    model, delta = attached()
    folder = tmp_path / "checkpoint-5"
    model.save_pretrained(folder, max_shard_size="5KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    arguments = SimpleNamespace(output_dir=str(tmp_path), should_save=True)
    DeltaCallback(delta).on_save(arguments, SimpleNamespace(global_step=5), SimpleNamespace())
    assert {path.name for path in folder.glob("model*")} == {"model.safetensors"}
    assert len(load_file(folder / "model.safetensors")) == len(delta.parameters())
    (folder / "model.safetensors").unlink()
    with pytest.raises(TrainError, match=r"wrote no `model.safetensors`.*keep_backbone=True"):
        DeltaCallback(delta).on_save(arguments, SimpleNamespace(global_step=5), SimpleNamespace())


def test_gradient_checkpointing_trains_the_same(tmp_path: Path) -> None:
    (plain, one), (saving, two) = attached(), attached()
    trainer(plain, tmp_path / "plain", save_strategy="no").train()
    trainer(
        saving,
        tmp_path / "saving",
        save_strategy="no",
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
    ).train()
    torch.testing.assert_close(one.vector(), two.vector(), rtol=0, atol=1e-6)


class _Vectors(TrainerCallback):
    """The delta's vector at each evaluation, which the callback of the delta has no part in."""

    def __init__(self, delta: dt.Delta) -> None:
        self.delta, self.at = delta, dict[int, Tensor]()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.at[state.global_step] = self.delta.vector()


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("spec", [SPEC, "prompt(tokens=3)", "vera(rank=2)"])
def test_the_best_step_is_what_a_run_ends_with(spec: str, keep: bool, tmp_path: Path) -> None:
    """Oracle: what the delta was at the evaluation with the best score, which is the second of
    three."""
    model = BERT.build(0)
    delta = dt.attach(model, spec, name="mine", seed=0)
    scores, seen = iter([0.5, 0.9, 0.1]), _Vectors(delta)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    made = trainer(
        model, tmp_path, DeltaCallback(delta, keep_backbone=keep), seen, eval_strategy="steps",
        eval_steps=2, save_steps=2, load_best_model_at_end=True, metric_for_best_model="score",
        greater_is_better=True,
    )  # fmt: skip
    made.compute_metrics = lambda _: {"score": next(scores)}
    made.train()
    assert made.state.best_global_step == 4 and list(seen.at) == [2, 4, 6]
    assert torch.equal(delta.vector(), seen.at[4])
    assert not torch.equal(seen.at[4], seen.at[6]) and not torch.equal(seen.at[4], seen.at[2])
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in frozen.items())
    again = dt.load(tmp_path / "checkpoint-4" / "delta", BERT.build(0))
    assert torch.equal(again.vector(), seen.at[4])
    torch.testing.assert_close(BERT.run(again.model.eval()), BERT.run(model.eval()))
