"""Merging two LoRAs of rank 8 into one of rank 8, for deltune and PEFT; and what is lost.

Query and value of a BERT of 12 layers and a given width. PEFT's `svd` makes every matrix of
changes and its whole singular value decomposition, `linear` sums the factors A and B each by
itself. Lost: || M - M' || / || M || over all matrices, M the weighted sum of the two changes.

Run by hand: `python benchmarks/bench_merging.py`.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timing import Ratio, interleave, milliseconds, one_thread, table, verdict

import deltune as dt
from deltune.merging import merge

WEIGHTS, RANK, BOUND = (0.7, 0.4), 8, 0.05


def bert(width: int) -> Any:
    from transformers import BertConfig, BertModel

    heads = {"num_attention_heads": width // 64, "intermediate_size": width}
    return BertModel(BertConfig(hidden_size=width, vocab_size=100, **heads)).eval()


def theirs(width: int) -> Any:
    """PEFT's model with two adapters of random tensors."""
    from peft import LoraConfig, get_peft_model

    options = {"r": RANK, "target_modules": ["query", "value"], "init_lora_weights": False}
    made = get_peft_model(bert(width), LoraConfig(**options), "one")
    made.add_adapter("two", LoraConfig(**options))
    return made


def lost(made: Any, name: str) -> float:
    """What an adapter leaves out of the weighted sum."""
    apart = whole = 0.0
    for layer in made.modules():
        if name in getattr(layer, "lora_A", {}):
            one, two = (layer.get_delta_weight(n).double() for n in ("one", "two"))
            wanted = WEIGHTS[0] * one + WEIGHTS[1] * two
            apart += float((layer.get_delta_weight(name).double() - wanted).square().sum())
            whole += float(wanted.square().sum())
    return (apart / whole) ** 0.5


def merger(made: Any, how: str) -> Callable[[], object]:
    """Merges by PEFT, under the same name every time."""

    def work() -> None:
        if how in made.peft_config:
            made.delete_adapter(how)
        made.add_weighted_adapter(["one", "two"], list(WEIGHTS), how, how, svd_rank=RANK)

    return work


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--width", type=int, default=768)
    given, machine = options.parse_args(), one_thread()
    torch.manual_seed(0)
    made, model = theirs(given.width), bert(given.width)
    with tempfile.TemporaryDirectory() as place:
        made.save_pretrained(place, selected_adapters=["one", "two"])
        folders = []
        for name in ("one", "two"):
            delta = dt.load_peft(Path(place, name), model, name=name)
            folders.append(delta.save(Path(place, f"ours {name}")))
            delta.detach()
        work = {
            "deltune, rank 8": lambda: merge(folders, weights=WEIGHTS, rank=RANK),
            "deltune, rank 16": lambda: merge(folders, weights=WEIGHTS),
            "peft svd": merger(made, "svd"),
            "peft linear": merger(made, "linear"),
        }
        times = interleave(work, given.rounds, warmup=1)
        errors = {
            "deltune, rank 8": merge(folders, weights=WEIGHTS, rank=RANK).error,
            "deltune, rank 16": merge(folders, weights=WEIGHTS).error,
            "peft svd": lost(made, "svd"),
            "peft linear": lost(made, "linear"),
        }
    rows = [
        [name, milliseconds(times[name]), Ratio.of(times, name, "peft svd"), f"{errors[name]:.4f}"]
        for name in work
    ]
    table(
        f"two LoRAs into one, width {given.width} ({machine}, {given.rounds} rounds)",
        ["", "ms", "over peft svd", "lost"], rows,
    )  # fmt: skip
    ratio = Ratio.of(times, "deltune, rank 8", "peft svd").median
    verdict("reading, merging at rank 8 over PEFT's svd in memory", ratio, BOUND)


if __name__ == "__main__":
    main()
