"""Loading the n-th delta onto one model, for deltune and PEFT; and saved bytes over tensor bytes.

LoRA of rank 8 on query and value of MiniLM is saved once and loaded 64 times under other names
onto one model, on a new model in every round. A library that walks all that is attached at every
load takes longer each time.

Run by hand: `python benchmarks/bench_load.py`.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from models import minilm, peft_lora
from timing import interleave, one_thread, table, verdict

import deltune as dt

BOUND, BYTES = 1.3, 1.02
MOST, SHOWN = 64, (2, 8, 32, 64)


def series(load: Callable[[str], object]) -> list[float]:
    """Seconds of the 2nd to the last load."""
    return [
        interleave({"load": lambda n=n: load(f"d{n}")}, 1, warmup=0)["load"][0]
        for n in range(2, MOST + 1)
    ]


def loader(folder: Path, library: str) -> Callable[[str], object]:
    """Loads the delta once onto a new model; gives what loads it under further names."""
    model: Any = minilm()
    if library == "deltune":
        dt.load(folder, model, "d1")
        return lambda name: dt.load(folder, model, name)
    from peft import PeftModel

    peft = PeftModel.from_pretrained(model, folder, adapter_name="d1", is_trainable=True)
    return lambda name: peft.load_adapter(folder, name)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rounds", type=int, default=7)
    rounds, machine = options.parse_args().rounds, one_thread()
    with tempfile.TemporaryDirectory() as place:
        folders = {"deltune": Path(place, "deltune"), "peft": Path(place, "peft")}
        delta = dt.attach(minilm(), "lora(rank=8)")
        delta.save(folders["deltune"])
        peft_lora(minilm()).save_pretrained(folders["peft"])
        times: dict[str, list[list[float]]] = {name: [] for name in folders}
        for _ in range(rounds):
            for name, folder in folders.items():
                times[name].append(series(loader(folder, name)))
        bytes_ = sum(t.numel() * t.element_size() for t in delta.tensors().values())
        sizes = {n: [p.stat().st_size for p in f.iterdir()] for n, f in folders.items()}
    growth = {n: statistics.median(s[-1] / s[0] for s in times[n]) for n in folders}
    rows = [
        [name, *(f"{1e3 * statistics.median(s[n - 2] for s in times[name]):.2f}" for n in SHOWN),
         f"{growth[name]:.2f}", *(f"{f(sizes[name]) / bytes_:.4f}" for f in (max, sum))]
        for name in folders
    ]  # fmt: skip
    table(
        f"loading the n-th delta, ms ({machine}, {rounds} rounds)",
        ["", *(f"n = {n}" for n in SHOWN), "64th / 2nd", "tensor file / tensors",
         "folder / tensors"], rows,
    )  # fmt: skip
    verdict("64th load over the 2nd", growth["deltune"], BOUND)
    verdict("saved tensor file over tensor bytes", max(sizes["deltune"]) / bytes_, BYTES)
    verdict("the whole folder over tensor bytes", sum(sizes["deltune"]) / bytes_, BYTES)


if __name__ == "__main__":
    main()
