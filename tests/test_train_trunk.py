"""Blocks that run once for each example. Oracle: the same training with all blocks, without dropout
where the trunk has none."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import deltune as dt
import tasks_toys
from deltune.tasks.task import Record, Task
from deltune.training.events import Checkpointed, Event, Noted

BLOCKS = 4
SIZE = {"vocab_size": 320, "pad_token_id": 0, "hidden_size": 16, "intermediate_size": 32}
SIZE |= {"num_hidden_layers": BLOCKS, "num_attention_heads": 2, "max_position_embeddings": 64}


def model_of(kind: str, labels: int = 2) -> Any:
    """A tiny model of four blocks; only its head has dropout."""
    torch.manual_seed(0)
    if kind == "llama":
        made: Any = transformers.LlamaForSequenceClassification(
            transformers.LlamaConfig(**SIZE, num_labels=labels)
        )
        return made.eval()
    made = transformers.BertForSequenceClassification(
        transformers.BertConfig(**SIZE, num_labels=labels)
    )
    for module in [made.bert.embeddings, made.bert.encoder]:
        for one in module.modules():
            if isinstance(one, nn.Dropout):
                one.p = 0.0
    return made.eval()


def task_of(kind: str) -> Task:
    texts = tasks_toys.texts(30)
    if kind == "choice":
        rows = [
            Record(texts[i], texts[i + 1], (texts[i + 1], texts[i + 2], "no")[: 2 + i % 2])
            for i in range(28)
        ]
        return Task("toy", "multiple_choice", "accuracy", None, rows[:14], rows[14:20], rows[20:])
    rows = [Record(text, ("no", "yes")[i % 3 == 0]) for i, text in enumerate(texts)]
    parts = rows[:14], rows[14:20], rows[20:]
    return Task("toy", "classification", "accuracy", ("no", "yes"), *parts)


def trained(kind: str, spec: str, cached: bool, **more: Any) -> tuple[Any, list[int], list[str]]:
    """The result, how often each block computed, and what was noted."""
    task = task_of(kind)
    model = model_of("llama" if kind == "llama" else "bert", 1 if kind == "choice" else 2)
    delta, counts, noted = dt.attach(model, spec, seed=0), [0] * BLOCKS, []
    tokenizer = tasks_toys.tokenizer("bert")
    blocks = model.model.layers if kind == "llama" else model.bert.encoder.layer
    stem = "input_layernorm" if kind == "llama" else "attention.self.query"
    for number, block in enumerate(blocks):
        part = block.get_submodule(stem)
        part.forward = _counting(part.forward, counts, number)

    def hear(event: Event) -> None:
        if isinstance(event, Noted):
            noted.append(event.text)

    settings = dt.TrainSettings(
        learning_rate=1e-2, num_train_epochs=3, per_device_train_batch_size=4,
        per_device_eval_batch_size=4, eval_steps=2, max_length=32, cache_frozen=cached,
    )  # fmt: skip
    on_event = more.pop("on_event", hear)
    result = dt.train(model, tokenizer, task, delta, settings, on_event=on_event, **more)
    assert not any("forward" in vars(block) for block in blocks)
    return result, counts, noted


def _counting(forward: Any, counts: list[int], number: int) -> Any:
    def counted(*args: Any, **options: Any) -> Any:
        counts[number] += 1
        return forward(*args, **options)

    return counted


@pytest.mark.parametrize("kind", ["classes", "choice", "llama"])
@pytest.mark.parametrize(
    ("spec", "depth"),
    [("head", 4), ("last(layers=1)", 3), ("lora(rank=2)[2:]", 2), ("bitfit", 0), ("prompt", 0)],
)
def test_training_is_that_of_all_blocks(kind: str, spec: str, depth: int) -> None:
    if kind == "llama" and spec == "bitfit":
        pytest.skip("has no biases")
    whole, every, _ = trained(kind, spec, cached=False)
    result, counts, noted = trained(kind, spec, cached=True)
    assert result.losses == pytest.approx(whole.losses, abs=2e-5)
    assert [dev for *_, dev in result.curve] == [dev for *_, dev in whole.curve]
    assert noted == [f"cache_frozen: {depth or 'no'} blocks run once for each example"]
    assert len(set(every)) == 1
    # 14 training and 6 dev examples in batches of 4, and the look at the model.
    assert counts[:depth] == [1 + 5] * depth
    assert counts[depth:] == [every[0] + 1] * (BLOCKS - depth)


def test_a_method_that_reads_the_trunk_has_none() -> None:
    """A ladder's side network reads the states of every block, which depend on nothing trained."""
    whole, _, _ = trained("classes", "ladder(reduction=4, heads=2)", cached=False)
    result, _, noted = trained("classes", "ladder(reduction=4, heads=2)", cached=True)
    assert noted == ["cache_frozen: no blocks run once for each example"]
    assert result.losses == whole.losses


def test_a_resumed_run_ends_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(event: Event) -> None:
        if isinstance(event, Checkpointed) and event.step == 4:
            raise Stop

    whole, _, _ = trained("classes", "last(layers=1)", cached=True)
    with pytest.raises(Stop):
        trained("classes", "last(layers=1)", cached=True, folder=tmp_path, on_event=stop)
    result, _, _ = trained("classes", "last(layers=1)", cached=True, folder=tmp_path)
    assert result.losses == whole.losses
