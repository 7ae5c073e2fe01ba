"""Oracles: the field names of transformers.TrainingArguments; the stated rules, value by value."""

import subprocess
import sys
from dataclasses import FrozenInstanceError, fields

import pytest

from deltune.errors import TrainError
from deltune.training.settings import TrainSettings

OURS = {"precision", "optimizer", "betas", "eps", "max_length", "group_by_length", "allow_unused"}
OURS |= {"cache_frozen", "backbone_dropout", "lean"}


def test_names_are_those_of_training_arguments() -> None:
    from transformers import EarlyStoppingCallback, TrainingArguments

    theirs = {field.name for field in fields(TrainingArguments)}
    theirs |= set(EarlyStoppingCallback().__init__.__code__.co_varnames)
    assert {field.name for field in fields(TrainSettings)} - OURS <= theirs


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"learning_rate": 0}, "learning_rate is 0; expected a finite number above 0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"learning_rate": "1e-3"}, "learning_rate is '1e-3'"),
        ({"num_train_epochs": -1}, "num_train_epochs is -1"),
        ({"max_steps": 0}, "max_steps is 0; expected a whole number, 1 or above"),
        ({"per_device_train_batch_size": 2.0}, "per_device_train_batch_size is 2.0"),
        ({"gradient_accumulation_steps": True}, "gradient_accumulation_steps is True"),
        ({"warmup_steps": 1.5}, "warmup_steps is 1.5; expected a whole number, or a fraction"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"max_grad_norm": float("inf")}, "max_grad_norm is inf"),
        ({"precision": "bf61"}, r"precision is 'bf61'.*did you mean `bf16`"),
        ({"lr_scheduler_type": "cosin"}, r"'cosin'.*`linear`.*did you mean `cosine`"),
        ({"optimizer": "sgd"}, "optimizer is 'sgd'; expected one of `adamw`, `adafactor`"),
        ({"eval_steps": 0}, "eval_steps is 0"),
        ({"eval_steps": "step"}, "eval_steps is 'step'"),
        ({"betas": (0.9, 1.0)}, "betas is"),
        ({"betas": 0.9}, "betas is 0.9"),
        ({"group_by_length": 1}, "group_by_length is 1; expected true or false"),
        ({"seed": -1}, "seed is -1"),
        ({"optimizer": "adafactor", "eps": 1e-6}, "belong to adamw alone"),
        ({"eval_steps": "no", "eval_on_start": True}, "eval_on_start is True"),
        ({"eval_steps": "no", "early_stopping_patience": 2}, "early_stopping_patience is 2"),
    ],
)
def test_refusals_quote_the_value(changes: dict, words: str) -> None:
    with pytest.raises(TrainError, match=words):
        TrainSettings(**changes)


def test_json_round_trip_and_close_match() -> None:
    settings = TrainSettings(betas=(0.8, 0.95), eval_steps=7, max_steps=3, precision="bf16")
    assert TrainSettings.from_json(settings.to_json()) == settings
    with pytest.raises(TrainError, match=r"unknown training setting `lerning_rate` \(did you mean"):
        TrainSettings.from_json({"lerning_rate": 1.0})


def test_warmup_and_steps() -> None:
    assert TrainSettings(warmup_steps=0.1).warmup(25) == 3
    assert TrainSettings(warmup_steps=4).warmup(25) == 4
    with pytest.raises(TrainError, match="warmup_steps is 30 and the run has 25 steps"):
        TrainSettings(warmup_steps=30).warmup(25)
    assert TrainSettings(num_train_epochs=1.5).total_steps(5) == 8
    assert TrainSettings(num_train_epochs=0.01).total_steps(5) == 1
    assert TrainSettings(max_steps=3).total_steps(5) == 3


def test_settings_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        TrainSettings().seed = 3  # ty: ignore[invalid-assignment]


def test_settings_events_and_schedule_import_no_torch() -> None:
    modules = "deltune.training.settings, deltune.training.events, deltune.training.schedule"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
